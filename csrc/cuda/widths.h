// Sources that contain LOWBIT_BITS are compiled once for each width, 1 to 8. This finds what was compiled for one.
#pragma once
#include <type_traits>
#include <utility>

// Tests compile them one by one, or none.
#ifndef LOWBIT_WIDTHS
#define LOWBIT_WIDTHS 1, 2, 3, 4, 5, 6, 7, 8
#endif

namespace lowbit {
namespace cuda {

template <int... WIDTHS>
using Widths = std::integer_sequence<int, WIDTHS...>;

// function(std::integral_constant<int, bits>()); `otherwise` where `bits` is no width that was compiled.
template <int... WIDTHS, class Function>
auto with_width(int bits, Function function, decltype(function(std::integral_constant<int, 4>())) otherwise,
                Widths<WIDTHS...>) {
  auto result = otherwise;
  ((bits == WIDTHS ? void(result = function(std::integral_constant<int, WIDTHS>())) : void()), ...);
  return result;
}

template <class Function>
auto with_width(int bits, Function function, decltype(function(std::integral_constant<int, 4>())) otherwise) {
  return with_width(bits, function, otherwise, Widths<LOWBIT_WIDTHS>());
}

inline bool has_width(int bits) {
  return with_width(bits, [](auto) { return true; }, false);
}

}  // namespace cuda
}  // namespace lowbit
