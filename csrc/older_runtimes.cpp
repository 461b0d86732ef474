// What newer glibc and libstdc++ have and manylinux_2_28 has not, defined here, hidden: the library then runs on the older
// ones too (`make wheel` has auditwheel look).
#include <new>
#include <sstream>

#define LOWBIT_HIDDEN __attribute__((visibility("hidden")))

#if defined(__linux__) && defined(__GLIBCXX__)

// glibc 2.32: libstdc++'s shared_ptr leaves atomic operations out while this is not 0.
extern "C" {
extern LOWBIT_HIDDEN char __libc_single_threaded;
LOWBIT_HIDDEN char __libc_single_threaded = 0;
}

#if _GLIBCXX_USE_CXX11_ABI
// libstdc++ 3.4.26: the constructors without arguments. Those with a mode are older.
extern "C" {
LOWBIT_HIDDEN void lowbit_ostringstream(void* self) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
LOWBIT_HIDDEN void lowbit_stringstream(void* self) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");

void lowbit_ostringstream(void* self) { new (self) std::ostringstream(std::ios_base::out); }
void lowbit_stringstream(void* self) { new (self) std::stringstream(std::ios_base::in | std::ios_base::out); }
}
#endif

#endif
