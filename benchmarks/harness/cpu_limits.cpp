// What this machine can do at best, measured: reading memory, and multiplying with nothing to read.
//
//   limits THREADS BYTES   -> one JSON object on standard output; every thread is pinned and reads BYTES of its own
//
// Rates are medians over short windows: of CPU time with one thread, which other work on the machine hardly touches, and
// of wall time with more, where the windows count in which every thread had a core to itself, if there are enough.
// Compile with -march=native: the peaks are those of the widest vectors there are.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

namespace {

constexpr int kWindows = 48;  // of about a millisecond: short enough to fall between interruptions
constexpr size_t kEnough = 3;  // windows
constexpr size_t kPieces = 8;  // of the memory to read, in turn
constexpr size_t kHugePage = size_t{2} << 20;

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

void pin(int index) {
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && index-- == 0) {
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      pthread_setaffinity_np(pthread_self(), sizeof one, &one);
      return;
    }
  }
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

struct Window {
  double rate, wall, cpu;
};

// Runs `body(thread)`, which returns what it got done, in every thread at once; the median over windows of the sum of
// the threads' rates. `prepare(thread)` comes before, untimed.
template <class Prepare, class Body>
double rate(int threads, Prepare prepare, Body body) {
  std::vector<std::vector<Window>> windows(threads, std::vector<Window>(kWindows));
  std::atomic<int> arrived{0};
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      pin(thread);
      prepare(thread);
      body(thread);
      for (int window = 0; window < kWindows; ++window) {
        ++arrived;
        while (arrived < threads * (window + 1)) sched_yield();
        const double wall = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
        const double done = body(thread);
        Window& w = windows[thread][window];
        w.cpu = seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
        w.wall = seconds(CLOCK_MONOTONIC) - wall;
        w.rate = done / (threads == 1 ? w.cpu : w.wall);
      }
    });
  }
  for (auto& thread : running) thread.join();
  std::vector<double> all, undisturbed;
  for (int window = 0; window < kWindows; ++window) {
    double sum = 0;
    bool alone = true;
    for (int thread = 0; thread < threads; ++thread) {
      const Window& w = windows[thread][window];
      sum += w.rate;
      alone &= w.cpu > 0.98 * w.wall;
    }
    all.push_back(sum);
    if (alone) undisturbed.push_back(sum);
  }
  return median(undisturbed.size() >= kEnough ? undisturbed : all);
}

// ------------------------------------------------------------------------------------------------ memory

typedef uint64_t Vector __attribute__((vector_size(64)));

// Four streams, a quarter of the bytes each: more requests are under way than one stream has.
__attribute__((noinline)) void read_streams(const char* data, size_t bytes) {
  const size_t quarter = bytes / 4;
  Vector sums[4] = {};
  for (size_t i = 0; i < quarter; i += 2 * sizeof(Vector)) {
#pragma GCC unroll 4
    for (int stream = 0; stream < 4; ++stream) {
      const Vector* at = reinterpret_cast<const Vector*>(data + stream * quarter + i);
      sums[stream] |= at[0] | at[1];
    }
  }
  for (Vector& sum : sums) asm volatile("" : : "m"(sum));
}

double read_bandwidth(int threads, size_t bytes, bool huge_pages) {
  std::vector<char*> data(threads);
  const size_t size = bytes + kHugePage;
  std::vector<void*> maps(threads);
  std::vector<int> next(threads);
  const double result = rate(
      threads,
      [&](int thread) {
        void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) {
          std::fprintf(stderr, "no %zu bytes to read\n", size);
          std::exit(1);
        }
        maps[thread] = map;
        const uintptr_t aligned = (reinterpret_cast<uintptr_t>(map) + kHugePage - 1) & ~(kHugePage - 1);
        data[thread] = reinterpret_cast<char*>(aligned);
        madvise(data[thread], bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        std::memset(data[thread], thread + 1, bytes);
      },
      [&](int thread) {
        const size_t piece = bytes / kPieces;
        read_streams(data[thread] + piece * (next[thread]++ % kPieces), piece);
        return static_cast<double>(piece);
      });
  for (void* map : maps) munmap(map, size);
  return result;
}

// ------------------------------------------------------------------------------------------------ peaks

struct Peak {
  const char* name;
  void (*run)(long count);  // `count` turns of 24 steps
  double operations;        // of one step, a product and a sum counting as two
};

#if defined(__x86_64__)

// A loop of twelve independent chains in registers, all of it in one asm statement so that nothing is spilled, moved or
// removed. STEP(V, i) is one step on accumulator V##i with the inputs V14 and V15; V13 is scratch.
#define TWELVE(STEP, V)                                                                                        \
  STEP(V, "0") STEP(V, "1") STEP(V, "2") STEP(V, "3") STEP(V, "4") STEP(V, "5") STEP(V, "6") STEP(V, "7") STEP(V, "8") \
      STEP(V, "9") STEP(V, "10") STEP(V, "11")
#define ZERO(V, i) "vpxor %%xmm" i ", %%xmm" i ", %%xmm" i "\n"
#define CHAINS(STEP, V, INPUT)                                                                                 \
  [](long count) {                                                                                             \
    asm volatile("vmovd %1, %%xmm13\n vpbroadcastd %%xmm13, %%" V "14\n vpbroadcastd %%xmm13, %%" V "15\n"     \
                 TWELVE(ZERO, V) "1:\n" TWELVE(STEP, V) TWELVE(STEP, V) "dec %0\n jnz 1b\n vzeroupper"        \
                 : "+r"(count)                                                                                 \
                 : "r"(INPUT)                                                                                  \
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",    \
                   "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc");                                         \
  }
#define THREE(NAME, V, i) NAME " %%" V "15, %%" V "14, %%" V i "\n"
#define FMA(V, i) THREE("vfmadd231ps", V, i)
#define DPBF16(V, i) THREE("vdpbf16ps", V, i)
#define DPBUSD(V, i) THREE("vpdpbusd", V, i)
#define MADDUBS(V, i)                                                                            \
  THREE("vpmaddubsw", V, "13") "vpmaddwd %%" V "15, %%" V "13, %%" V "13\n vpaddd %%" V "13, %%" V i ", %%" V i "\n"

constexpr int kFloat = 0x3f800001, kBFloat = 0x3f803f80, kBytes = 0x01010101;

const Peak kPeaks[] = {
#if defined(__AVX2__) && defined(__FMA__)
    {"fp32 avx2", CHAINS(FMA, "ymm", kFloat), 2 * 8},
    {"int8 avx2", CHAINS(MADDUBS, "ymm", kBytes), 2 * 32},
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
    {"fp32 avx512", CHAINS(FMA, "zmm", kFloat), 2 * 16},
    {"int8 avx512", CHAINS(MADDUBS, "zmm", kBytes), 2 * 64},
#endif
#if defined(__AVX512VNNI__)
    {"int8 avx512vnni", CHAINS(DPBUSD, "zmm", kBytes), 2 * 64},
#endif
#if defined(__AVX512BF16__)
    {"bf16 avx512bf16", CHAINS(DPBF16, "zmm", kBFloat), 2 * 32},
#endif
    {nullptr, nullptr, 0},
};

#else
const Peak kPeaks[] = {{nullptr, nullptr, 0}};
#endif

double peak(int threads, const Peak& what) {
  constexpr long kCount = 100000;
  return rate(
      threads, [](int) {},
      [&](int) {
        what.run(kCount);
        return 24.0 * kCount * what.operations;
      });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: limits THREADS BYTES\n");
    return 2;
  }
  const int threads = std::atoi(argv[1]);
  const size_t bytes = std::strtoull(argv[2], nullptr, 10) & ~(kHugePage - 1);
  std::printf("{\"read_gb_s\": {\"huge pages\": %.2f, \"4 KiB pages\": %.2f}", read_bandwidth(threads, bytes, true) / 1e9,
              read_bandwidth(threads, bytes, false) / 1e9);
  std::printf(", \"peak_gop_s\": {");
  for (const Peak* what = kPeaks; what->name; ++what)
    std::printf("%s\"%s\": %.1f", what == kPeaks ? "" : ", ", what->name, peak(threads, *what) / 1e9);
  std::printf("}}\n");
}
