// Codes as bytes to values, one table at a time: out[i] = table[codes[i]] * scale. Up to 64 bytes behind the codes may
// be read. Each of the files below has
//   Table, FixedTable                            the entries of a table as look-ups read them, as floats and as words T
//   look_up(codes, n, bits, table, scale, out)   floats;  look_up(codes, n, bits, fixed_table, out): words
// The preprocessor chooses one: how a table is stored and which instructions read it differ in every line.
#pragma once
#if defined(__AVX512VBMI__)
#include "cpu/codebook/table_look_up_vbmi.h"
#elif defined(__AVX512F__)
#include "cpu/codebook/table_look_up_avx512.h"
#elif defined(__AVX2__)
#include "cpu/codebook/table_look_up_avx2.h"
#else
#include "cpu/codebook/table_look_up_scalar.h"
#endif
