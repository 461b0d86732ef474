// The functions of primitives.h on a CPU, for tests: a kernel that is compiled with LOWBIT_EMULATED runs here.
//
// Every thread of a block is a fibre with a stack of its own. A warp runs until all its threads stand at a barrier or
// have left; products of matrices wait for all 32 threads of their warp. Blocks run one after the other. An error of
// the kernel is a Fault, where a GPU would give wrong numbers or nothing at all:
//
// - a global access outside the arrays of the call, or misaligned; a shared one outside the block's bytes;
// - shared bytes that are read before they are written, or while a copy to them is on its way;
// - shared bytes that two warps touch, one of them writing, with no barrier between;
// - a product that only a part of a warp takes part in; threads that leave while others wait at a barrier;
// - copies that are never waited for.
//
// Copies arrive when they are waited for, which is the last moment at which a GPU may deliver them. The products of one
// multiply_matrices are exact, summed in float64 and rounded once: a little more precise than a tensor core. Not
// modelled: speed, caches, races inside a warp.
#pragma once
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#undef LOWBIT_UNROLL
#define LOWBIT_UNROLL
#define LOWBIT_DEVICE inline
#define LOWBIT_KERNEL(threads, blocks) inline void

namespace lowbit {
namespace cuda {

using Stream = void*;
struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

namespace emulation {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ------------------------------------------------------------------------------------------------------------- numbers

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint16_t sign = bits_of(value) >> 16 & 0x8000;
  const double size = std::fabs(double(value));
  if (std::isnan(value)) return 0x7FFF;
  if (size >= 65520.0) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = size < std::ldexp(1.0, -14) ? -24 : exponent - 11;  // of the last bit
  const double steps = std::nearbyint(std::ldexp(size, -exponent));
  // adding the fraction to the exponent carries where it was rounded up to the next power of two
  const int field = exponent == -24 ? 0 : (exponent + 24) << 10;
  return sign | static_cast<uint16_t>(field + static_cast<int>(steps));
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  return std::isnan(value) ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <DType T>
float number(uint16_t bits) {
  static const std::vector<float> halves = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) all[i] = half_to_float(static_cast<uint16_t>(i));
    return all;
  }();
  return T == DType::bf16 ? float_of(uint32_t(bits) << 16) : halves[bits];
}

// ------------------------------------------------------------------------------------------------------- global memory

struct Range {
  const char *begin, *end;
};

inline std::vector<Range>& ranges() {  // the arrays of the call
  static std::vector<Range> all;
  return all;
}

inline bool& ranges_known() {  // else any address is taken for one of an array
  static bool known = false;
  return known;
}

inline void check_global(const void* at, size_t size) {
  const char* p = static_cast<const char*>(at);
  if (reinterpret_cast<uintptr_t>(p) % size)
    throw Fault("a global access of " + std::to_string(size) + " bytes is misaligned");
  if (!ranges_known()) return;
  for (const Range& range : ranges())
    if (p >= range.begin && p + size <= range.end) return;
  throw Fault("a global access is outside the arrays of the call");
}

// -------------------------------------------------------------------------------------------------------------- fibres

constexpr size_t STACK = 256 << 10;

#if defined(__x86_64__)
// Keeps what a called function keeps, and goes on with another stack.
extern "C" void lowbit_switch_stack(void** from, void* to);
asm(R"(
.text
.weak lowbit_switch_stack
lowbit_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

struct Context {
  void* stack = nullptr;
  void enter_at(char* top, void (*function)()) {
    void** place = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--place = nullptr;
    *--place = reinterpret_cast<void*>(function);
    stack = place - 6;
  }
  void go_to(Context& other) { lowbit_switch_stack(&stack, other.stack); }
};
#else
struct Context {
  ucontext_t state;
  void enter_at(char* top, void (*function)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = top - STACK;
    state.uc_stack.ss_size = STACK;
    state.uc_link = nullptr;
    makecontext(&state, function, 0);
  }
  void go_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

enum class At { ready, product, barrier, left };

struct Copy {
  int to, size;
  char bytes[16];
  int group;
};

struct Thread {
  Context context;
  At at = At::ready;
  const char* what = "";  // of the product that it waits for
  uint32_t a[4], b[2];
  float* sums = nullptr;
  int32_t* integer_sums = nullptr;
  std::vector<Copy> copies;
  int group = 0;
};

// One block. `epoch` counts its barriers.
struct Block {
  int index = 0, current = 0, epoch = 1;
  std::vector<Thread> threads;
  std::vector<char> shared;
  // Of every shared byte: the epoch and the warp (-1: several) of the last write and the last read; copies on their way.
  struct Byte {
    int written = 0, writer = 0, read = 0, reader = 0, coming = 0;
  };
  std::vector<Byte> bytes;
  Context scheduler;
  std::function<void()> body;
  std::string fault;

  Thread& thread() { return threads[current]; }
  int warp() const { return current / 32; }

  void wait(At at) {
    Thread& me = thread();
    me.at = at;
    me.context.go_to(scheduler);
  }

  Byte* check_shared(int at, int size) {
    if (at < 0 || at + size > static_cast<int>(shared.size()))
      throw Fault("shared address " + std::to_string(at) + " is outside " + std::to_string(shared.size()) + " bytes");
    if (at % size) throw Fault("shared address " + std::to_string(at) + " is misaligned");
    return &bytes[at];
  }

  void note_read(int at, int size) {
    Byte* all = check_shared(at, size);
    for (int i = 0; i < size; ++i) {
      Byte& byte = all[i];
      const std::string where = "shared address " + std::to_string(at + i);
      if (byte.coming) throw Fault(where + " is read while a copy to it is on its way");
      if (!byte.written) throw Fault(where + " is read before it is written");
      if (byte.written == epoch && byte.writer != warp())
        throw Fault(where + " was written by another warp: no barrier");
      byte.reader = byte.read == epoch && byte.reader != warp() ? -1 : warp();
      byte.read = epoch;
    }
  }

  void note_write(int at, int size, int coming) {
    Byte* all = check_shared(at, size);
    for (int i = 0; i < size; ++i) {
      Byte& byte = all[i];
      const std::string where = "shared address " + std::to_string(at + i);
      if (byte.coming && coming >= 0) throw Fault(where + " is written while a copy to it is on its way");
      if (byte.read == epoch && byte.reader != warp()) throw Fault(where + " was read by another warp: no barrier");
      if (byte.written == epoch && byte.writer != warp()) throw Fault(where + " is written by two warps: no barrier");
      byte.coming += coming;
      byte.written = epoch;
      byte.writer = warp();
    }
  }
};

inline Block*& block() {
  static Block* running = nullptr;
  return running;
}

inline void run_thread() {
  Block& b = *block();
  try {
    b.body();
    if (!b.thread().copies.empty()) throw Fault("a thread leaves with copies that it has not waited for");
  } catch (const std::exception& error) {
    if (b.fault.empty()) b.fault = error.what();
  }
  b.wait(At::left);
}

// sums += a @ b for the warp whose threads all wait for this product
template <DType T>
void multiply_warp(Thread* warp) {
  double a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j)
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = number<T>(static_cast<uint16_t>(warp[lane].a[i] >> 16 * j));
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) b[g][2 * t + i * 8 + j] = number<T>(static_cast<uint16_t>(warp[lane].b[i] >> 16 * j));
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const double *left = a[lane / 4 + i / 2 * 8], *right = b[lane % 4 * 2 + i % 2];
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[k] * right[k];
      warp[lane].sums[i] = static_cast<float>(sum + double(warp[lane].sums[i]));
    }
}

// The same of bytes: a without a sign, b with one. A sum that int32 cannot hold is a Fault.
inline void multiply_warp_bytes(Thread* warp, bool left_is_signed) {
  int a[16][32], b[8][32];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 4; ++i) {
        const uint8_t byte = static_cast<uint8_t>(warp[lane].a[i] >> 8 * j);
        a[g + i % 2 * 8][4 * t + i / 2 * 16 + j] = left_is_signed ? static_cast<int8_t>(byte) : int(byte);
      }
      for (int i = 0; i < 2; ++i) b[g][4 * t + i * 16 + j] = static_cast<int8_t>(warp[lane].b[i] >> 8 * j);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int *left = a[lane / 4 + i / 2 * 8], *right = b[lane % 4 * 2 + i % 2];
      int64_t sum = warp[lane].integer_sums[i];
      for (int k = 0; k < 32; ++k) sum += left[k] * right[k];
      if (sum != static_cast<int32_t>(sum)) throw Fault("a sum of products of bytes is more than int32 holds");
      warp[lane].integer_sums[i] = static_cast<int32_t>(sum);
    }
}

inline const char F16[] = "float16", BF16[] = "bfloat16", BYTES[] = "bytes", SIGNED_BYTES[] = "signed bytes";

// Runs one warp until its threads are at a barrier or have left. Whether any of them has moved.
inline bool run_warp(Block& b, int warp) {
  Thread* threads = &b.threads[32 * warp];
  for (bool moved = false;; moved = true) {
    int products = 0, ready = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (threads[lane].at == At::ready) {
        ++ready;
        b.current = 32 * warp + lane;
        b.scheduler.go_to(threads[lane].context);
        if (!b.fault.empty()) return true;
      }
      products += threads[lane].at == At::product;
    }
    if (products == 0) return moved || ready > 0;
    for (int lane = 0; lane < 32; ++lane)
      if (threads[lane].at != At::product || threads[lane].what != threads[0].what) {
        b.fault = "only a part of a warp takes part in a product of matrices";
        return true;
      }
    if (threads[0].what == BYTES || threads[0].what == SIGNED_BYTES)
      multiply_warp_bytes(threads, threads[0].what == SIGNED_BYTES);
    else
      threads[0].what == F16 ? multiply_warp<DType::f16>(threads) : multiply_warp<DType::bf16>(threads);
    for (int lane = 0; lane < 32; ++lane) threads[lane].at = At::ready;
  }
}

// The order of warps: a bug that one order hides, another may show.
inline int& order() {
  static int which = 0;
  return which;
}

inline void run_block(Block& b, char* stacks) {
  const int threads = static_cast<int>(b.threads.size()), warps = threads / 32;
  for (int i = 0; i < threads; ++i) b.threads[i].context.enter_at(stacks + (i + 1) * STACK, run_thread);
  while (true) {
    bool moved = false;
    for (int i = 0; i < warps && b.fault.empty(); ++i) moved |= run_warp(b, order() ? warps - 1 - i : i);
    if (!b.fault.empty()) throw Fault(b.fault);
    int waiting = 0, left = 0;
    for (Thread& thread : b.threads) waiting += thread.at == At::barrier, left += thread.at == At::left;
    if (left == threads) return;
    if (left > 0 && waiting > 0) throw Fault("some threads of a block leave while others wait at a barrier");
    if (waiting == threads) {
      ++b.epoch;
      for (Thread& thread : b.threads) thread.at = At::ready;
    } else if (!moved) {
      throw Fault("the threads of a block wait for each other");
    }
  }
}

}  // namespace emulation

// ---------------------------------------------------------------------------------------- the functions of primitives.h

inline int thread_index() { return emulation::block()->current; }
inline int block_index() { return emulation::block()->index; }
inline void barrier() { emulation::block()->wait(emulation::At::barrier); }

template <class T>
T load(const T* at) {
  emulation::check_global(at, sizeof(T));
  return *at;
}

template <class T>
T load_once(const T* at) {
  return load(at);
}

template <class T>
void store(T* at, T value) {
  emulation::check_global(at, sizeof(T));
  *at = value;
}

template <class T>
T load_shared_as(int at) {
  emulation::Block& b = *emulation::block();
  b.note_read(at, sizeof(T));
  T value;
  std::memcpy(&value, &b.shared[at], sizeof(T));
  return value;
}

inline Words4 load_shared4(int at) { return load_shared_as<Words4>(at); }
inline Words2 load_shared2(int at) { return load_shared_as<Words2>(at); }
inline float load_shared(int at) { return load_shared_as<float>(at); }
inline uint32_t load_shared_word(int at) { return load_shared_as<uint32_t>(at); }
inline uint16_t load_shared_half(int at) { return load_shared_as<uint16_t>(at); }

template <class T>
void store_shared(int at, T value) {
  emulation::Block& b = *emulation::block();
  b.note_write(at, sizeof(T), 0);
  std::memcpy(&b.shared[at], &value, sizeof(T));
}

inline void store_shared4(int at, Words4 value) { store_shared(at, value); }

namespace emulation {

inline void begin_copy(int to, const void* from, int size, bool zeros) {
  Block& b = *block();
  Copy copy{to, size, {}, b.thread().group};
  if (!zeros) {
    check_global(from, size);
    std::memcpy(copy.bytes, from, size);
  }
  b.note_write(to, size, +1);
  b.thread().copies.push_back(copy);
}

}  // namespace emulation

inline void copy_async(int to, const void* from, bool zeros) { emulation::begin_copy(to, from, 16, zeros); }
inline void copy_async8(int to, const void* from) { emulation::begin_copy(to, from, 8, false); }

inline void commit_copies() { ++emulation::block()->thread().group; }

template <int PENDING>
void wait_copies() {
  emulation::Block& b = *emulation::block();
  std::vector<emulation::Copy>& copies = b.thread().copies;
  std::vector<emulation::Copy> later;
  for (const emulation::Copy& copy : copies) {
    if (copy.group >= b.thread().group - PENDING) {
      later.push_back(copy);
      continue;
    }
    b.note_write(copy.to, copy.size, -1);
    std::memcpy(&b.shared[copy.to], copy.bytes, copy.size);
  }
  copies = later;
}

using emulation::bits_of;
using emulation::float_of;

inline uint32_t select_bytes(uint32_t a, uint32_t which) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= (a >> 8 * (which >> 4 * i & 3) & 0xFFu) << 8 * i;
  return bytes;
}

inline uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t b) { return (a & mask) | b; }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float multiply(float a, float b) { return a * b; }
inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }
inline float not_a_number() { return emulation::float_of(0x7FFFFFFFu); }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t codes) {
  if (codes & 0x8888u) throw emulation::Fault("a byte is chosen by a number above 7");
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t chosen = 0;
  for (int n = 0; n < 4; ++n) chosen |= static_cast<uint32_t>(both >> 8 * (codes >> 4 * n & 7) & 255) << 8 * n;
  return chosen;
}

template <DType T>
float to_float(uint16_t bits) {
  return emulation::number<T>(bits);
}

template <DType T>
uint16_t from_float(float value) {
  return T == DType::bf16 ? emulation::float_to_bfloat(value) : emulation::float_to_half(value);
}

template <DType T>
uint32_t subtract_pair(uint32_t a, uint32_t b) {
  uint32_t pair = 0;
  for (int i = 0; i < 2; ++i) {  // float32 has room for twice the bits and two more: rounded twice is rounded once
    const float d = to_float<T>(static_cast<uint16_t>(a >> 16 * i)) - to_float<T>(static_cast<uint16_t>(b >> 16 * i));
    pair |= uint32_t(from_float<T>(d)) << 16 * i;
  }
  return pair;
}

template <DType T>
uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair = 0;
  for (int i = 0; i < 2; ++i) {
    const auto half = [&](uint32_t bits) { return double(to_float<T>(static_cast<uint16_t>(bits >> 16 * i))); };
    const double exact = half(a) * half(b) + half(c);
    if (exact != double(float(exact))) throw emulation::Fault("a multiply-add of pairs that float32 cannot hold");
    pair |= uint32_t(from_float<T>(static_cast<float>(exact))) << 16 * i;
  }
  return pair;
}

template <class T>
T opaque(T value) {
  return value;
}

template <DType T>
void multiply_matrices(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::Thread& me = emulation::block()->thread();
  me.a[0] = a0, me.a[1] = a1, me.a[2] = a2, me.a[3] = a3, me.b[0] = b0, me.b[1] = b1;
  me.sums = sums;
  me.what = T == DType::f16 ? emulation::F16 : emulation::BF16;
  emulation::block()->wait(emulation::At::product);
}

inline void multiply_any_bytes(const char* what, int32_t (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                               uint32_t b0, uint32_t b1) {
  emulation::Thread& me = emulation::block()->thread();
  me.a[0] = a0, me.a[1] = a1, me.a[2] = a2, me.a[3] = a3, me.b[0] = b0, me.b[1] = b1;
  me.integer_sums = sums;
  me.what = what;
  emulation::block()->wait(emulation::At::product);
}

inline void multiply_bytes(int32_t (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  multiply_any_bytes(emulation::BYTES, sums, a0, a1, a2, a3, b0, b1);
}

inline void multiply_signed_bytes(int32_t (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                  uint32_t b1) {
  multiply_any_bytes(emulation::SIGNED_BYTES, sums, a0, a1, a2, a3, b0, b1);
}

inline Device& emulated_device() {
  static Device device = {80, 1, 163 << 10};
  return device;
}

inline int read_device(int, Device& device) {
  device = emulated_device();
  return 0;
}

inline constexpr const char* ARCHITECTURES = "";

inline const char* error_text(int) { return "no error is known to the emulation"; }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, Stream, Arguments... arguments) {
  static char* const stacks = static_cast<char*>(mmap(nullptr, 1024 * emulation::STACK, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (threads % 32 || threads > 1024) throw emulation::Fault("a block must have whole warps, up to 1024 threads");
  for (int i = 0; i < blocks; ++i) {
    emulation::Block block;
    block.index = i;
    block.threads.resize(threads);
    block.shared.assign(shared_bytes, char(0xFF));
    block.bytes.resize(shared_bytes);
    block.body = [=] { kernel(static_cast<Parameters>(arguments)...); };
    emulation::block() = &block;
    emulation::run_block(block, stacks);
  }
  return 0;
}

}  // namespace cuda
}  // namespace lowbit
