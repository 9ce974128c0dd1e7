// bf16: two packed in a register, the matrix instruction that takes them.
struct Bf16 {
  // PTX ISA: cvt.rn.bf16x2.f32; its first source is the upper half.
  DEV u32 pack(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  // D (16x8) += A (16x16) B (16x8). PTX ISA: mma.sync.m16n8k16.
  DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// f16: two packed in a register, the matrix instruction that takes them.
struct F16 {
  // PTX ISA: cvt.rn.f16x2.f32; its first source is the upper half.
  DEV u32 pack(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  // D (16x8) += A (16x16) B (16x8). PTX ISA: mma.sync.m16n8k16.
  DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// e4m3: four packed in a register.
struct E4m3 {
  // Rounded to the nearest, ends at 448. PTX ISA: cvt.rn.satfinite.e4m3x2.f32; its first source is the upper half.
  DEV u32 pack(float a, float b, float c, float d) {
    u32 r;
    asm("{\n"
        ".reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
        "mov.b32 %0, {lo, hi};\n"
        "}" : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
  }
};
