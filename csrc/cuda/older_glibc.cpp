// glibc 2.34 took libpthread, libdl and librt into libc, and their functions got that version. They also have the one that
// earlier glibc knows. Here each function is a hidden jump to it, so that liblowbit_cuda.so, which has the CUDA runtime in
// it, runs on manylinux_2_28 wherever it was linked. It then needs those libraries by name (setup.py); in newer glibc they
// are there, and empty.
#include <cstdlib>

#if defined(__linux__) && defined(__GLIBC__) && defined(__x86_64__)

#define LOWBIT_JUMP(name, version)                                                                 \
  __asm__(".text\n.globl " #name "\n.hidden " #name "\n.type " #name ", @function\n" #name ":\n" \
          "jmp lowbit_older_" #name "@PLT\n.size " #name ", .-" #name "\n"                         \
          ".symver lowbit_older_" #name ", " #name "@" version "\n");
#define LOWBIT_OLDER(name) LOWBIT_JUMP(name, "GLIBC_2.2.5")

LOWBIT_JUMP(dlmopen, "GLIBC_2.3.4")
LOWBIT_OLDER(dlclose)
LOWBIT_OLDER(dlerror)
LOWBIT_OLDER(dlopen)
LOWBIT_OLDER(dlsym)
LOWBIT_OLDER(dlvsym)
LOWBIT_OLDER(pthread_condattr_setpshared)
LOWBIT_OLDER(pthread_create)
LOWBIT_OLDER(pthread_detach)
LOWBIT_OLDER(pthread_getspecific)
LOWBIT_OLDER(pthread_join)
LOWBIT_OLDER(pthread_key_create)
LOWBIT_OLDER(pthread_key_delete)
LOWBIT_OLDER(pthread_kill)
LOWBIT_OLDER(pthread_mutex_trylock)
LOWBIT_OLDER(pthread_mutexattr_destroy)
LOWBIT_OLDER(pthread_mutexattr_init)
LOWBIT_OLDER(pthread_mutexattr_setpshared)
LOWBIT_OLDER(pthread_mutexattr_settype)
LOWBIT_OLDER(pthread_once)
LOWBIT_OLDER(pthread_rwlock_destroy)
LOWBIT_OLDER(pthread_rwlock_init)
LOWBIT_OLDER(pthread_rwlock_rdlock)
LOWBIT_OLDER(pthread_rwlock_timedrdlock)
LOWBIT_OLDER(pthread_rwlock_timedwrlock)
LOWBIT_OLDER(pthread_rwlock_tryrdlock)
LOWBIT_OLDER(pthread_rwlock_trywrlock)
LOWBIT_OLDER(pthread_rwlock_unlock)
LOWBIT_OLDER(pthread_rwlock_wrlock)
LOWBIT_OLDER(pthread_rwlockattr_destroy)
LOWBIT_OLDER(pthread_rwlockattr_init)
LOWBIT_OLDER(pthread_rwlockattr_setpshared)
LOWBIT_OLDER(pthread_setspecific)
LOWBIT_OLDER(pthread_spin_destroy)
LOWBIT_OLDER(pthread_spin_init)
LOWBIT_OLDER(pthread_spin_lock)
LOWBIT_OLDER(pthread_spin_trylock)
LOWBIT_OLDER(pthread_spin_unlock)
LOWBIT_OLDER(sem_destroy)
LOWBIT_OLDER(sem_init)
LOWBIT_OLDER(sem_post)
LOWBIT_OLDER(sem_timedwait)
LOWBIT_OLDER(sem_trywait)
LOWBIT_OLDER(sem_wait)
LOWBIT_OLDER(shm_open)
LOWBIT_OLDER(shm_unlink)

#endif
