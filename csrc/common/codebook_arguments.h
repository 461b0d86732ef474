// The arguments of the ops of the family `codebook` (declared in lowbit/codebook/op.py), checked and turned into an
// operand.
#pragma once
#include "common/arguments.h"
#include "common/codebook.h"

namespace lowbit {
namespace codebook {

// The three tensors of quantized scales: see `Nested`.
struct NestedArguments {
  const OptionalTensor &codebook, &absmax, &offset;
};

// The weight's part of an op's arguments.
struct WeightArguments {
  const Tensor &packed, &codebook;
  const OptionalTensor& scales;
  NestedArguments nested;
  OutlierArguments outliers;
  int64_t bits, group_size, layout, K;
};

inline const void* check_nested(const Caller& op, const char* name, const Tensor& t, int64_t count) {
  check_stored(op, name, t, count);
  LOWBIT_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32: got ",
               dtype_name(t.scalar_type()));
  return t.const_data_ptr();
}

inline Weight check_weight(const Caller& op, const WeightArguments& arguments) {
  const auto& [packed, codebook, scales, nested_scales, outliers, bits, group_size, layout, K] = arguments;
  const auto& [scale_codebook, scale_absmax, scale_offset] = nested_scales;
  Weight w{};
  check_codes(op, packed, 1, bits, group_size, layout, K, /*blocks_too=*/false, w);

  check_device(op, "codebook", codebook);
  const int64_t entries = int64_t(1) << bits;
  const auto shaped = [&table = codebook, entries](int64_t rows, int64_t groups) {
    return table.dim() == 3 && table.size(0) == rows && table.size(1) == groups && table.size(2) == entries;
  };
  const bool tensor = shaped(1, 1), row = shaped(w.N, 1), group = shaped(w.N, w.G);
  LOWBIT_CHECK(tensor || row || group, op, ": codebook must be of shape [1, 1, ", entries, "], [N, 1, ", entries,
               "] or [N, G, ", entries, "] for bits=", bits, ", N=", w.N, ", G=", w.G, ": got ", shape_of(codebook));
  LOWBIT_CHECK(codebook.is_contiguous(), op, ": codebook must be contiguous");
  w.tables = tensor ? Weight::Tables::tensor : row ? Weight::Tables::row : Weight::Tables::group;
  w.codebook_dtype = check_float(op, "codebook", codebook.scalar_type());
  w.codebook = codebook.const_data_ptr();

  const bool nested = scale_codebook.has_value();
  LOWBIT_CHECK(nested == scale_absmax.has_value() && nested == scale_offset.has_value(), op,
               ": scale_codebook, scale_absmax and scale_offset must be given together");
  LOWBIT_CHECK(scales || !nested, op, ": scales must be given with scale_codebook, scale_absmax and scale_offset");
  if (scales) {
    check_stored(op, "scales", *scales, w.N, w.G);
    const ScalarType dtype = scales->scalar_type();
    if (nested) {
      LOWBIT_CHECK(dtype == ScalarType::Byte, op, ": scales must be uint8 with scale_codebook: got ",
                   dtype_name(dtype));
      w.scales_dtype = DType::u8;
      w.nested.codebook = static_cast<const float*>(check_nested(op, "scale_codebook", *scale_codebook, 256));
      w.nested.absmax =
          static_cast<const float*>(check_nested(op, "scale_absmax", *scale_absmax, (w.N * w.G + 255) / 256));
      w.nested.offset = static_cast<const float*>(check_nested(op, "scale_offset", *scale_offset, 1));
    } else {
      w.scales_dtype = check_float(op, "scales", dtype);
    }
    w.scales = scales->const_data_ptr();
  } else if (w.tables != Weight::Tables::group) {
    w.G = 1;
    w.group_size = K;
  }
  w.outliers = check_outliers(op, outliers, w.N, K);
  return w;
}

}  // namespace codebook
}  // namespace lowbit
