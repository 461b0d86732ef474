// How register tiles read x, and how K is cut into segments.
//
// Kinds of activations:
//   int8     `Quantizer` rounds a row, or each group of its columns
//   pieces   floats, where int8 dot products are fast (VNNI). A segment of a row becomes integers of 24 bits, or of 32,
//            the largest above 2^22 or 2^30; each is three or four digits to base 256, -128 .. 127. Each digit is a row
//            of int8 activations. Sums of their products are exact, and cheaper than those of fp32
//   bf16     bfloat16 x, where there are bf16 dot products
//   f32      all other floats
// Pieces and bf16 products cannot hold rows that are not finite or that are very large or small, and sums of fp32
// products may overflow where y does not: these are fallback rows. Elements too large for the pieces of their segment,
// or too small for bf16 products, are listed.
#pragma once
#include "common/operands.h"
#include "cpu/packed/register_tiles.h"

namespace lowbit {
namespace {

enum class Kind { int8, pieces, bf16, f32 };

struct Schedule {
  Kind kind;
  int pieces;        // rows of words that hold one row of x (a fourth piece stands apart)
  int sums;          // of a segment of a row: one, or one for each of four pieces
  int steps;         // of a quad of columns
  int64_t tile;      // rows of x in a register tile
  bool fused;        // few rows of x: register tiles unpack blocks themselves
  bool tall;         // tall register tiles, all of one height (zeros behind M): they take one block at a time
  int64_t stride;    // positions from one run to the next: a run begins with a quad
  int64_t padded;    // positions per row; zeros stand behind runs and behind K
  int64_t segment;   // positions per segment; the last of a run may be shorter
  int64_t per_run, per_group, per_x_group;  // segments
  int64_t segments;  // per row
  int64_t slice;     // segments for which a panel is expanded at a time
  bool in_place;     // positions are columns
  bool whole_chunks;  // segments begin and end with chunks
  bool exact;        // int8 activations and one group with an integer zero: one int32 sum over all of K
  bool scaled;       // each segment of a row of x has a scale: pieces, and int8 activations in groups

  template <class Linear>
  Schedule(const Linear& a, bool integer_zeros) {
    const auto& w = a.weight;
    kind = kHasVnni ? Kind::pieces : Kind::f32;
    if (kHasBf16 && a.dtype == DType::bf16 && (a.batch_invariant || a.M > few_rows_in_pieces(w.bits)))
      kind = Kind::bf16;
    if (a.int8) kind = Kind::int8;
    pieces = kind == Kind::pieces ? kPieces : 1;
    sums = kind == Kind::pieces ? kFourPieces : 1;
    steps = kind == Kind::f32 ? FloatDot32::kSteps : kind == Kind::bf16 ? 2 : 1;
    // A run of columns has one group of w and one of x. One of their sizes divides the other, where there are groups.
    const bool x_groups = kind == Kind::int8 && a.x_group > 0 && a.x_group < w.K;
    const int64_t group = w.G == 1 ? w.K : w.group_size, x_group = x_groups ? a.x_group : w.K;
    const int64_t run = min64(group, x_group), runs = ceil_div(w.K, run);
    exact = kind == Kind::int8 && w.G == 1 && !x_groups && integer_zeros && w.K <= kExactK;
    scaled = kind == Kind::pieces || x_groups;
    in_place = runs == 1 || run % 4 == 0;
    whole_chunks = runs == 1 || run % kChunkColumns == 0;
    const int64_t rows = a.M * pieces;
    fused = w.blocks && whole_chunks && rows <= (kind == Kind::f32 ? kTallTileRows : kMostTallRows);
    tall = fused && rows > max64(kWideTileRows, pieces);
    const int64_t tall_tiles = ceil_div(a.M, max64(1, kTallTileRows / pieces));
    const int64_t tall_rows = ceil_div(a.M, tall_tiles);
    tile = tall ? (pieces > 1 ? tall_rows : round_up(tall_rows, 4)) : max64(1, kPanelTileRows / pieces);
    stride = runs == 1 ? round_up(w.K, kChunkColumns) : round_up(run, 4);
    padded = in_place ? round_up(w.K, kChunkColumns) : round_up(runs * stride, kChunkColumns);
    const int64_t longest = kind == Kind::int8 ? kIntSegment : 2 * kFloatSegment;
    segment = stride <= longest ? stride : kind == Kind::int8 ? kIntSegment : kFloatSegment;
    per_run = ceil_div(stride, segment);
    per_group = per_run * ceil_div(group, run);
    per_x_group = per_run * ceil_div(x_group, run);
    segments = (runs - 1) * per_run + ceil_div(w.K - (runs - 1) * run, segment);
    slice = max64(1, kIntSegment / steps / segment);
  }

  int64_t begin(int64_t s) const { return s / per_run * stride + s % per_run * segment; }
  int64_t end(int64_t s) const { return s + 1 == segments ? padded : begin(s + 1); }
  int64_t group(int64_t s) const { return s / per_group; }
  int64_t row_steps() const { return padded / 4 * steps; }

  // Rows of x of register tile t
  int64_t rows(int64_t M, int64_t t) const { return tall ? tile : min64(tile, M - t * tile); }
};

}  // namespace
}  // namespace lowbit
