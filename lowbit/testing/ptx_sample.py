"""Which of the code that ships is executed as PTX: names of entries of benchmarks/tools/compiled.json, by target."""

NAMES = (
    *(
        f"packed packed_linear {what}, launch {number}: packed_linear_kernel"
        for what, number in (
            ("2-bit group 128 float16 M=16", 1), ("3-bit group 128 bfloat16 M=16", 1),
            ("4-bit group 128 float16 M=512", 1), ("5-bit group 128 float32 M=16", 1),
            ("6-bit group 128 int8 M=16", 2), ("7-bit group 128 bfloat16 M=512", 1),
            ("8-bit group 128 int8 M=4096", 2), ("8-bit group 128 bfloat16 M=16", 1),
        )
    ),
    *(
        f"codebook codebook_linear {what}, launch {number}: codebook_linear_kernel"
        for what, number in (
            ("1-bit row bfloat16 M=16", 1), ("2-bit tensor, group 64 float16 M=16", 1),
            ("3-bit row bfloat16 M=512", 1), ("4-bit tensor, group 64 float16 M=16", 1),
            ("4-bit row int8 M=16", 3), ("5-bit row float32 M=16", 1), ("8-bit tensor, group 64 float16 M=16", 1),
        )
    ),
    "packed packed_experts 4-bit group 128 bfloat16 M=16, launch 2: packed_linear_kernel",
    "packed packed_experts 8-bit per row int8 M=4096, launch 2: packed_linear_kernel",
    "codebook codebook_experts 3-bit row float16 M=16, launch 2: codebook_linear_kernel",
    "codebook codebook_experts 4-bit row int8 M=16, launch 4: codebook_linear_kernel",
    "kron linear 64x64 x 64x64, bfloat16, dense factors, M=4096, launch 1: kron_resident_kernel",
    "kron linear 2x1 x 384x3072, float16, dense factors, M=1, launch 1: kron_summed_kernel",
)  # fmt: skip
ARCHITECTURES = ("sm_80", "sm_90")
SAMPLE = [(target, name) for target in ARCHITECTURES for name in NAMES]
