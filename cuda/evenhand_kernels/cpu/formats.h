// All forms of weights, by their numbers.
#pragma once

#include "k_quants.h"
#include "weight.h"

// What the number of a format means: 0 float32, 1 bfloat16, 2 float16; QUANTIZED: codes of 4 bits, which have minima; plus
// 1 and 2: of 8 bits without and with them; plus 3: scales and minima are float32, not float16; plus 6, 7 and 8: K-quants of 4, 5 and 6 bits.
constexpr int QUANTIZED = 3;

template <typename Visit>
static void dispatch_format(int format, const Visit& visit) {
  switch (format) {
    case 0: return visit(Plain<float>{});
    case 1: return visit(Plain<BFloat16>{});
    case 2: return visit(Plain<Float16>{});
    case QUANTIZED + 0: return visit(Grouped<4, Float16, true>{});
    case QUANTIZED + 1: return visit(Grouped<8, Float16, false>{});
    case QUANTIZED + 2: return visit(Grouped<8, Float16, true>{});
    case QUANTIZED + 3: return visit(Grouped<4, float, true>{});
    case QUANTIZED + 4: return visit(Grouped<8, float, false>{});
    case QUANTIZED + 5: return visit(Grouped<8, float, true>{});
    case QUANTIZED + 6: return visit(KQuant<4>{});
    case QUANTIZED + 7: return visit(KQuant<5>{});
    case QUANTIZED + 8: return visit(KQuant<6>{});
  }
}
