// Powers of two, of vectors of numbers.
#pragma once

#include ISA_VECTORS

constexpr float kLog2e = 1.44269504f;

// 2**x for x up to 0, within 2**-22 of itself; exactly 1 for 0, 0 below -200, NaN for NaN. The
// polynomial has the least squared relative error on -1/2 to 1/2.
inline Floats power_of_two(Floats x) {
    x = larger(same_float(-200), x);
    const Floats whole = round_to_integers(x);
    const Floats part = subtract(x, whole);
    Floats y = same_float(0.00132186722f);
    constexpr float kCoefficients[] = {0.00967169832f, 0.0555089302f, 0.24022238f, 0.693146884f, 1.0f};
    for (const float coefficient : kCoefficients) {
        y = multiply_add(y, part, same_float(coefficient));
    }
    return scale_by_power(y, whole);
}
