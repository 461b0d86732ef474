// The arguments that ops of several families share: structs of tensors, and checks that turn them into operands.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "common/checks.h"
#include "common/operands.h"

namespace lowbit {

using OptionalTensor = std::optional<Tensor>;

// What the ops' argument `layout` says: the numbers of lowbit/backends/layouts.py, of those that kernels here read.
constexpr int64_t kCanonicalLayout = 0, kTilesLayout = 1, kBlocksLayout = 2;
constexpr int64_t kTile = 256;  // codes

inline void check_codes(const Caller& op, const Tensor& packed, int64_t min_bits, int64_t bits, int64_t group_size,
                        int64_t layout, int64_t K, bool blocks_too, Codes& w) {
  LOWBIT_CHECK(bits >= min_bits && bits <= 8, op, ": bits must be between ", min_bits, " and 8: got bits=", bits);
  LOWBIT_CHECK(K >= 1, op, ": in_features must be at least 1: got ", K);
  LOWBIT_CHECK(group_size >= 1 && group_size <= K, op, ": group_size must be between 1 and K: got group_size=",
               group_size, ", K=", K);
  w.N = packed.dim() > 0 ? packed.size(0) : 0;
  w.K = K;
  w.group_size = group_size;
  w.G = (K - 1) / group_size + 1;
  w.bits = int(bits);
  w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  if (op.tiles) {
    const int64_t tiles = (K - 1) / kTile + 1;
    LOWBIT_CHECK(layout == kTilesLayout, op, ": layout must be 1 (tiles): got layout=", layout);
    check_device(op, "packed", packed);
    LOWBIT_CHECK(packed.scalar_type() == ScalarType::Int, op, ": packed must be int32: got ",
                 dtype_name(packed.scalar_type()));
    LOWBIT_CHECK(packed.dim() == 3 && packed.size(1) == tiles && packed.size(2) == 8 * bits && packed.is_contiguous(),
                 op, ": packed in tiles must be [N, ", tiles, ", ", 8 * bits, "] for K=", K, ", bits=", bits,
                 ", and contiguous: got shape ", shape_of(packed));
    w.row_bytes = tiles * 32 * bits;
    return;
  }
  LOWBIT_CHECK(layout == kCanonicalLayout || (blocks_too && layout == kBlocksLayout), op,
               ": layout must be 0 (canonical words)", blocks_too ? " or 2 (blocks)" : "", ": got layout=", layout);
  w.blocks = layout == kBlocksLayout;
  LOWBIT_CHECK(packed.dim() == (w.blocks ? 4 : 2), op, ": packed must have ", w.blocks ? "four" : "two",
               " dimensions for layout=", layout, ": got shape ", shape_of(packed));
  LOWBIT_CHECK(packed.scalar_type() == ScalarType::Int, op, ": packed must be int32: got ",
               dtype_name(packed.scalar_type()));
  const int64_t words = ((K - 1) / 32 + 1) * bits;
  if (w.blocks) {
    LOWBIT_CHECK(packed.size(1) * bits == words && packed.size(2) == bits && packed.size(3) == 1, op,
                 ": packed in blocks must be [N, ", words / bits, ", ", bits, ", 1] for K=", K, ", bits=", bits,
                 ": got shape ", shape_of(packed));
    check_device(op, "packed", packed);
    LOWBIT_CHECK(packed.is_contiguous(), op, ": packed must be contiguous");
  } else {
    LOWBIT_CHECK(packed.size(1) == words, op, ": packed must have ceil(K/32)*bits = ", words, " words per row for K=",
                 K, ", bits=", bits, ": got ", packed.size(1));
    check_stored(op, "packed", packed, w.N, words);
  }
  w.row_bytes = words * 4;
}

// The three tensors of a sparse part, as every op takes them.
struct OutlierArguments {
  const OptionalTensor &values, &columns, &rows;
};

inline Outliers check_outliers(const Caller& op, const OutlierArguments& given_tensors, int64_t N, int64_t K) {
  const auto& [outlier_values, outlier_columns, outlier_rows] = given_tensors;
  Outliers o{};
  const bool given = outlier_values.has_value();
  LOWBIT_CHECK(given == outlier_columns.has_value() && given == outlier_rows.has_value(), op,
               ": outlier_values, outlier_columns and outlier_rows must be given together");
  if (!given || outlier_values->numel() == 0) return o;
  const int64_t nnz = outlier_values->numel();
  const ScalarType columns = outlier_columns->scalar_type();
  const bool pairs = columns == ScalarType::Byte;
  check_stored(op, "outlier_values", *outlier_values, nnz);
  check_stored(op, "outlier_columns", *outlier_columns, nnz, pairs ? 2 : -1);
  check_stored(op, "outlier_rows", *outlier_rows, N + 1);
  o.dtype = check_float(op, "outlier_values", outlier_values->scalar_type());
  o.values = outlier_values->const_data_ptr();
  LOWBIT_CHECK(columns == ScalarType::Int || (columns == ScalarType::Short && K <= 32768) ||
                   ((pairs || columns == ScalarType::UInt16) && K <= 65536),
               op, ": outlier_columns must be int16 (K <= 32768), uint16 or pairs of uint8 (K <= 65536), or int32: got ",
               dtype_name(columns), ", K=", K);
  o.wide = columns == ScalarType::Int;
  o.columns = outlier_columns->const_data_ptr();
  LOWBIT_CHECK(outlier_rows->scalar_type() == ScalarType::Int, op, ": outlier_rows must be int32: got ",
               dtype_name(outlier_rows->scalar_type()));
  o.rows = static_cast<const int32_t*>(outlier_rows->const_data_ptr());
  if (op.tiles) return o;  // a layer has checked the values

  // Row pointers and columns index memory, so their values are checked too.
  bool ordered = o.rows[0] == 0 && o.rows[N] == nnz;
  for (int64_t n = 0; n < N; ++n) ordered &= o.rows[n] <= o.rows[n + 1];
  LOWBIT_CHECK(ordered, op, ": outlier_rows must rise from 0 to the number of outliers (", nnz, ")");
  const auto column = [&o](int64_t i) -> uint32_t {  // read as unsigned, a negative column is a large one
    if (o.wide) return static_cast<const uint32_t*>(o.columns)[i];
    uint16_t narrow;
    std::memcpy(&narrow, static_cast<const uint8_t*>(o.columns) + 2 * i, 2);
    return narrow;
  };
  uint32_t largest = 0;
  for (int64_t i = 0; i < nnz; ++i) largest = std::max(largest, column(i));
  LOWBIT_CHECK(int64_t(largest) < K, op, ": outlier_columns must be between 0 and K - 1: got ",
               o.wide                         ? int64_t(int32_t(largest))
               : columns == ScalarType::Short ? int64_t(int16_t(largest))
                                              : int64_t(largest),
               ", K=", K);
  bool rising = true;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = o.rows[n] + 1; i < o.rows[n + 1]; ++i) rising &= column(i - 1) < column(i);
  LOWBIT_CHECK(rising, op, ": outlier_columns must increase within each row: they do not");
  return o;
}

// The K of x, [..., K].
inline int64_t check_activations(const Caller& op, const Tensor& x) {
  check_device(op, "x", x);
  LOWBIT_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  check_float(op, "x", x.scalar_type());
  return x.size(x.dim() - 1);
}

// How x is held while it is multiplied.
struct ActivationArguments {
  bool int8;
  const OptionalTensor& x_scale;
  int64_t x_group;
};

// Fills in what of `a` a bias and the activations' arguments say.
template <class Weight>
void check_call(const Caller& op, const OptionalTensor& bias, const ActivationArguments& x, Linear<Weight>& a) {
  if (bias) {
    check_stored(op, "bias", *bias, a.weight.N);
    a.bias_dtype = check_float(op, "bias", bias->scalar_type());
    a.bias = bias->const_data_ptr();
  }
  a.int8 = x.int8;
  a.x_group = x.x_group;
  LOWBIT_CHECK(x.int8 || !x.x_scale, op, ": x_scale is for int8 activations: got x_scale with int8=False");
  if (!x.x_scale) return;
  check_stored(op, "x_scale", *x.x_scale, 1);
  LOWBIT_CHECK(x.x_scale->scalar_type() == ScalarType::Float, op, ": x_scale must be float32: got ",
               dtype_name(x.x_scale->scalar_type()));
  a.x_scale = static_cast<const float*>(x.x_scale->const_data_ptr());
  if (op.tiles) return;
  LOWBIT_CHECK(*a.x_scale > 0 && std::isfinite(*a.x_scale) && std::isfinite(1 / *a.x_scale), op,
               ": x_scale must be positive and finite, and its inverse too: got ", *a.x_scale);
}

inline void check_ids(const Caller& op, const Tensor& ids) {
  check_device(op, "ids", ids);
  const ScalarType type = ids.scalar_type();
  LOWBIT_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": ids must be int32 or int64: got ",
               dtype_name(type));
}

}  // namespace lowbit
