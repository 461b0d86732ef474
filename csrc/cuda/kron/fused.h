// Launches of kron/fused.cuh.
#pragma once
#include <algorithm>

#include "common/kron.h"
#include "common/operands.h"
#include "cuda/codes.h"
#include "cuda/device.h"

namespace lowbit {
namespace cuda {
namespace kron_fused {

using Call = Linear<kron::Weight>;

constexpr int THREADS = 256;

// Where things are in shared memory: bytes.
struct Sizes {
  int p, x, y;                    // where they begin; Q is first
  int q_pitch, p_pitch, y_pitch;  // between rows; x has that of Q
  int q_plane, p_plane, x_plane;  // between planes, of x for one row of it
  int y_row;                      // between rows of y
  int total;
};

// Columns of operands, in chunks of 32.
inline int padded_k(int k) { return (k + 31) / 32 * 32; }

// Neighbouring rows differ by 64 bytes modulo 128: what 8 threads read of two of them is in different banks.
inline int pitch_of(int k) { return 2 * padded_k(k) + (padded_k(k) % 64 ? 0 : 64); }

inline Sizes sizes_of(int terms, int NQ, int KQ, int NP, int KP, int N1, int N2, int q_planes, int p_planes,
                      int x_planes, int rows, int stages) {
  Sizes s;
  s.q_pitch = pitch_of(KQ), s.p_pitch = pitch_of(KP);
  s.y_pitch = 4 * ((N2 + 11) / 16 * 16 + 4);  // threads with the same g, then those with the same t, differ in banks
  s.q_plane = (NQ + 15) / 16 * 16 * s.q_pitch, s.p_plane = (NP + 7) / 8 * 8 * s.p_pitch;
  s.x_plane = padded_k(KP) * s.q_pitch;
  s.y_row = N1 * s.y_pitch;
  s.p = terms * q_planes * s.q_plane;
  s.x = s.p + terms * p_planes * s.p_plane;
  s.y = s.x + stages * rows * x_planes * s.x_plane;
  s.total = s.y + rows * s.y_row;
  return s;
}

const char* declines(const Call& call, const Device& device);
int launch(const Call& call, const Device& device, Stream stream);

}  // namespace kron_fused
}  // namespace cuda
}  // namespace lowbit
