// Products of bfloat16 rows by AMX tiles, where the processor has them, with weights in bfloat16 or fewer bits. Tested against what
// linear.py says that they are. Built by native.py, called from there and from layers.cpp.
//
// A weight lies in memory tile by tile, 16 outputs by 32 inputs (of int8 by int8 64). Of fewer bits each tile is widened to bfloat16 on
// its way to the processor's tiles, so only a half or a third as much is read from memory. A target's rows are rounded no further than
// bfloat16 is, a draft's to whole numbers. For a few dozen rows weights are the left operand: their rows are outputs, as they lie, and
// x is transposed; for more, weights are transposed once for all. Either way every sum is made in the same order.

#include "tiles.h"

#include "layers.h"
#include "numbers.h"

#ifdef CONFU_TILES
#include <cmath>

namespace {

static_assert(LANES == TILE && MOST_GATED <= 2 * TILE);
constexpr int64_t WEIGHTS = TILE * PAIRS;  // of a tile in bfloat16
constexpr int64_t BLOCKS = 4;              // tiles of rows that share what is read of a weight
constexpr int64_t AHEAD = 4, RING = 8;     // tiles are widened so many before they are needed, into so many places,
constexpr int64_t FETCH = 64;              // and asked of memory so many before

// A tile in memory is BYTES long; `widen` writes 16 outputs of 32 inputs each in bfloat16. Where there is NOTHING to widen the
// processor reads them from where they lie.

// They are bfloat16.
struct Wide {
    static constexpr int64_t BYTES = 2 * WEIGHTS, INPUTS = PAIRS;
    static constexpr bool NOTHING = true, WHOLE_ROWS = false;
    static void widen(const uint8_t*, uint16_t*) {}
};

// Whole numbers up to 127 by rows that are rounded to such, too, which no target's are.
struct Rough {
    static constexpr int64_t BYTES = 2 * WEIGHTS, INPUTS = 2 * PAIRS;
    static constexpr bool NOTHING = true, WHOLE_ROWS = true;
    static void widen(const uint8_t*, uint16_t*) {}
};

struct Widened {
    static constexpr int64_t INPUTS = PAIRS;
    static constexpr bool NOTHING = false, WHOLE_ROWS = false;
};

inline __m512 widen_bytes(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// Whole numbers up to 127, which are exact in bfloat16: of each output first those for even inputs, then for odd ones.
struct Whole : Widened {
    static constexpr int64_t BYTES = WEIGHTS;

    // As float32, whose upper half is all there is of them; pairs of these halves.
    static void widen(const uint8_t* from, uint16_t* to) {
        const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
        for (int64_t i = 0; i < WEIGHTS; i += PAIRS) {
            const __m512i even = _mm512_castps_si512(widen_bytes(from + i)), odd = _mm512_castps_si512(widen_bytes(from + i + TILE));
            // 0xca: where the mask has ones the second, else the third
            _mm512_store_si512(to + i, _mm512_ternarylogic_epi32(upper, odd, _mm512_srli_epi32(even, 16), 0xca));
        }
    }
};

// 16 float16 numbers, each of which is soon needed in all lanes: from memory that costs nothing, while a compiler that sees them
// in a register shuffles it for every one.
struct Halves {
    alignas(64) float of[TILE];
    explicit Halves(const uint8_t* from) {
        _mm512_store_ps(of, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
        asm volatile("" : : "r"(of) : "memory");
    }
    __m512 operator[](int64_t output) const { return _mm512_set1_ps(of[output]); }
};

// Blocks of 32 inputs: number x step + least of each output (GGUF's Q4_1, and Q4_0 with a least of -8 steps). Of four outputs 16
// bits for each input, the first output's number lowest; then all steps, all leasts, in float16.
struct Block4 : Widened {
    static constexpr int64_t BYTES = WEIGHTS / 2 + 4 * TILE;

    // The 16 values of each of two outputs' blocks make a table, in which their numbers are looked up: the second's with a bit set.
    // Numbers are moved down by multiplying, which takes half as long here as a shift.
    static void widen(const uint8_t* from, uint16_t* to) {
        const Halves steps(from + WEIGHTS / 2), leasts(from + WEIGHTS / 2 + 2 * TILE);
        const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i four_bits = _mm512_set1_epi16(15), second = _mm512_set1_epi16(16);
        const auto look_up = [&](int64_t output, __m512i first_numbers, __m512i second_numbers) {
            const auto values = [&](int64_t i) { return _mm512_fmadd_ps(all, steps[i], leasts[i]); };
            const __m512i table = __m512i(_mm512_cvtne2ps_pbh(values(output + 1), values(output)));
            _mm512_store_si512(to + output * PAIRS, _mm512_permutexvar_epi16(first_numbers, table));
            _mm512_store_si512(to + (output + 1) * PAIRS, _mm512_permutexvar_epi16(second_numbers, table));
        };
        for (int64_t i = 0; i < TILE; i += 4) {
            const __m512i numbers = _mm512_loadu_si512(from + i * PAIRS / 2);
            const auto down = [&](int bits) { return _mm512_mulhi_epu16(numbers, _mm512_set1_epi16(short(1 << (16 - bits)))); };
            // 0xea: the first where the second has ones, and the third
            look_up(i, _mm512_and_si512(numbers, four_bits), _mm512_ternarylogic_epi32(down(4), four_bits, second, 0xea));
            look_up(i + 2, _mm512_and_si512(down(8), four_bits), _mm512_or_si512(down(12), second));
        }
    }
};

// Blocks of 32 inputs: number x step of each output (GGUF's Q8_0): the numbers of each output, then all steps in float16.
struct Block8 : Widened {
    static constexpr int64_t BYTES = WEIGHTS + 2 * TILE;

    static void widen(const uint8_t* from, uint16_t* to) {
        const Halves steps(from + WEIGHTS);
        for (int64_t i = 0; i < TILE; i++) {
            const uint8_t* numbers = from + i * PAIRS;
            _mm512_store_si512(to + i * PAIRS, __m512i(_mm512_cvtne2ps_pbh(_mm512_mul_ps(widen_bytes(numbers + TILE), steps[i]),
                                                                           _mm512_mul_ps(widen_bytes(numbers), steps[i]))));
        }
    }
};

// The processor's tiles are named by literals.
#define ADD(SUM, WEIGHT, ROWS)              \
    if constexpr (Format::WHOLE_ROWS)       \
        _tile_dpbssd(SUM, WEIGHT, ROWS);    \
    else                                    \
        _tile_dpbf16ps(SUM, WEIGHT, ROWS);

// COLUMNS times 16 outputs, `next` bytes from each other, of up to COUNT times 16 rows, whose tiles lie one behind the other: sums
// [COLUMNS, COUNT, 16 outputs, 16 rows]. A sum waits for the one before it, so at least two are on their way at a time.
template <typename Format, int COUNT, int COLUMNS>
void multiply(const uint16_t* x, const uint8_t* weight, int64_t next, int64_t tiles, uint16_t* ring, float* sums) {
    static_assert(COUNT <= 4 && COUNT * COLUMNS <= 4 && COLUMNS <= 2);
    const int64_t stride = tiles * WEIGHTS;
    const auto place = [&](int64_t k, int64_t column) { return ring + (k % RING * COLUMNS + column) * WEIGHTS; };
    const auto widen = [&](int64_t k) {
        Format::widen(weight + k * Format::BYTES, place(k, 0));
        if constexpr (COLUMNS > 1) Format::widen(weight + next + k * Format::BYTES, place(k, 1));
        asm volatile("" : : : "memory");  // tiles are loaded by what a compiler does not see
    };
    const auto wide = [&](int64_t k, int64_t column) -> const void* {
        if constexpr (Format::NOTHING) return weight + column * next + k * Format::BYTES;
        return place(k, column);
    };
    _tile_zero(0);
    if constexpr (COUNT * COLUMNS > 1) _tile_zero(1);
    if constexpr (COUNT * COLUMNS > 2) _tile_zero(2);
    if constexpr (COUNT * COLUMNS > 3) _tile_zero(3);
    for (int64_t k = 0; k < AHEAD && k < tiles; k++) widen(k);
    for (int64_t k = 0; k < tiles; k++) {
        for (int64_t column = 0; column < COLUMNS; column++)
            for (int64_t line = 0; line < Format::BYTES; line += 64)
                _mm_prefetch(reinterpret_cast<const char*>(weight + column * next + (k + FETCH) * Format::BYTES + line), _MM_HINT_T1);
        if (k + AHEAD < tiles) widen(k + AHEAD);
        const uint16_t* rows = x + k * WEIGHTS;
        _tile_loadd(6, wide(k, 0), 64);
        if constexpr (COLUMNS > 1) _tile_loadd(7, wide(k, 1), 64);
        _tile_loadd(4, rows, 64);
        ADD(0, 6, 4)
        if constexpr (COLUMNS > 1 && COUNT == 1) {
            ADD(1, 7, 4)
        } else if constexpr (COLUMNS > 1) {
            ADD(2, 7, 4)
        }
        if constexpr (COUNT > 1) {
            _tile_loadd(5, rows + stride, 64);
            ADD(1, 6, 5)
            if constexpr (COLUMNS > 1) {
                ADD(3, 7, 5)
            }
        }
        if constexpr (COUNT > 2) {
            _tile_loadd(4, rows + 2 * stride, 64);
            ADD(2, 6, 4)
        }
        if constexpr (COUNT > 3) {
            _tile_loadd(5, rows + 3 * stride, 64);
            ADD(3, 6, 5)
        }
    }
    _tile_stored(0, sums, 64);
    if constexpr (COUNT * COLUMNS > 1) _tile_stored(1, sums + TILE * TILE, 64);
    if constexpr (COUNT * COLUMNS > 2) _tile_stored(2, sums + 2 * TILE * TILE, 64);
    if constexpr (COUNT * COLUMNS > 3) _tile_stored(3, sums + 3 * TILE * TILE, 64);
}

template <typename Format>
void multiply(int64_t count, int64_t columns, const uint16_t* x, const uint8_t* weight, int64_t next, int64_t tiles, uint16_t* ring,
              float* sums) {
    if (count == 1 && columns == 1) multiply<Format, 1, 1>(x, weight, next, tiles, ring, sums);
    if (count == 1 && columns == 2) multiply<Format, 1, 2>(x, weight, next, tiles, ring, sums);
    if (count == 2 && columns == 1) multiply<Format, 2, 1>(x, weight, next, tiles, ring, sums);
    if (count == 2 && columns == 2) multiply<Format, 2, 2>(x, weight, next, tiles, ring, sums);
    if (count == 3) multiply<Format, 3, 1>(x, weight, next, tiles, ring, sums);
    if (count == 4) multiply<Format, 4, 1>(x, weight, next, tiles, ring, sums);
}

uint16_t* aligned(std::vector<uint16_t>& memory, size_t count) {
    if (memory.size() < count + 32) memory.resize(count + 32);
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

constexpr int64_t MOST = 256;  // rows at a time, whose tiles stay in a cache

// A thread's own copy of some rows, in tiles [row tiles, tiles of inputs, 1,024 bytes], and the rows' steps: as the left operand 16 rows
// each, as the right one TURNED, 16 pairs of inputs (or fours) each.
template <typename Format, bool TURNED> struct Rows {
    const uint16_t* tiles;
    const float* steps = nullptr;

    Rows(const uint16_t* x, int64_t rows, int64_t inputs) {
        static thread_local std::vector<uint16_t> memory, whole_memory;
        static thread_local std::vector<float> its_steps;
        const int64_t count = inputs / Format::INPUTS, padded = (rows + TILE - 1) / TILE * TILE;
        uint16_t* to = aligned(memory, padded / TILE * count * WEIGHTS);
        tiles = to;
        const auto* from = reinterpret_cast<const uint32_t*>(x);  // 16 of them make a row of a tile
        if constexpr (Format::WHOLE_ROWS) {
            its_steps.resize(padded);
            steps = its_steps.data();
            auto* whole = reinterpret_cast<int8_t*>(aligned(whole_memory, rows * inputs / 2));
            for (int64_t i = 0; i < rows; i++) its_steps[i] = rounded_row(x + i * inputs, inputs, whole + i * inputs);
            from = reinterpret_cast<const uint32_t*>(whole);
        }
        for (int64_t first = 0; first < rows; first += TILE)
            for (int64_t k = 0; k < count; k++, to += WEIGHTS) {
                const uint32_t* tile = from + (first * count + k) * TILE;
                if constexpr (TURNED)
                    transpose(tile, count * TILE, rows - first, reinterpret_cast<uint32_t*>(to));
                else
                    for (int64_t i = 0; i < TILE; i++)
                        _mm512_store_si512(to + i * PAIRS, first + i < rows ? _mm512_loadu_si512(tile + i * count * TILE) : __m512i());
            }
    }

    // Whole numbers up to 127, and what times them the row is about.
    static float rounded_row(const uint16_t* x, int64_t inputs, int8_t* to) {
        const auto wide = [&](int64_t i) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        };
        __m512 most = _mm512_set1_ps(1e-30f);
        for (int64_t i = 0; i < inputs; i += TILE) most = _mm512_max_ps(most, _mm512_abs_ps(wide(i)));
        const float largest = _mm512_reduce_max_ps(most);
        const __m512 by = _mm512_set1_ps(127 / largest);
        for (int64_t i = 0; i < inputs; i += TILE)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(wide(i), by))));
        return largest / 127;
    }
};

// 16 outputs of one row: sums, times the row's step and the outputs' scales, plus their bias, if there are any.
struct Outputs {
    __m512 by, plus;

    Outputs(const Product& p, int64_t first)
        : by(p.scales ? _mm512_loadu_ps(p.scales + first) : _mm512_set1_ps(1)),
          plus(p.bias ? _mm512_loadu_ps(p.bias + first) : _mm512_setzero_ps()) {}
    __m256i of(const uint32_t* sums, const float* step) const {
        const __m512i bits = _mm512_load_si512(sums);
        const __m512 sum = step ? _mm512_mul_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(*step)) : _mm512_castsi512_ps(bits);
        return __m256i(_mm512_cvtneps_pbh(_mm512_fmadd_ps(sum, by, plus)));
    }
};

// The same of 16 rows, whose sums lie the other way.
struct Result {
    alignas(64) uint32_t turned[TILE * TILE];
    const Outputs outputs;
    const float* steps;

    Result(const Product& p, int64_t first, const float* steps, float* sums) : outputs(p, first), steps(steps) {
        transpose(reinterpret_cast<uint32_t*>(sums), TILE, TILE, turned);
    }
    __m256i of_row(int64_t i) const { return outputs.of(turned + i * TILE, steps ? steps + i : nullptr); }
};

// Of up to BLOCKS times 16 rows; the outputs are shared by the threads of a team, which do not wait for each other.
template <typename Format> void product(const Product& p, const uint16_t* x, uint16_t* out, int64_t rows) {
    const int64_t tiles = p.inputs / Format::INPUTS, count = (rows + TILE - 1) / TILE, next = tiles * Format::BYTES;
    const int64_t together = count <= 2 ? 2 : 1;  // columns of tiles
    const Rows<Format, true> packed(x, rows, p.inputs);
    alignas(64) uint16_t ring[2 * RING * WEIGHTS];
    alignas(64) float sums[BLOCKS * TILE * TILE];
#pragma omp for schedule(static) nowait
    for (int64_t column = 0; column < p.outputs / TILE; column += together) {
        const int64_t columns = p.outputs / TILE - column < together ? p.outputs / TILE - column : together;
        multiply<Format>(count, columns, packed.tiles, p.weight + column * next, next, tiles, ring, sums);
        for (int64_t block = 0; block < columns * count; block++) {
            const int64_t output = (column + block / count) * TILE, row = block % count * TILE;
            const Result result(p, output, packed.steps ? packed.steps + row : nullptr, sums + block * TILE * TILE);
            for (int64_t i = 0; i < TILE && row + i < rows; i++)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (row + i) * p.outputs + output), result.of_row(i));
        }
    }
}

// Of any number of rows: weights are widened once for all of them, and turned, so that rows are the left operand and results lie as
// they should. The same sums in the same order.
template <typename Format> void long_product(const Product& p, const uint16_t* x, uint16_t* out, int64_t rows) {
    static thread_local std::vector<uint16_t> wide_memory;
    const int64_t tiles = p.inputs / Format::INPUTS, next = tiles * Format::BYTES;
    const Rows<Format, false> left(x, rows, p.inputs);
    uint16_t* wide = aligned(wide_memory, 2 * tiles * WEIGHTS);
    alignas(64) uint16_t tile[WEIGHTS];
    alignas(64) uint32_t sums[4 * TILE * TILE];
#pragma omp for schedule(static) nowait
    for (int64_t column = 0; column < p.outputs / TILE; column += 2) {
        const int64_t columns = p.outputs / TILE - column < 2 ? 1 : 2;
        for (int64_t k = 0; k < columns * tiles; k++) {
            const uint8_t* from = p.weight + column * next + k * Format::BYTES;
            if (!Format::NOTHING) Format::widen(from, tile);
            transpose(reinterpret_cast<const uint32_t*>(Format::NOTHING ? from : reinterpret_cast<const uint8_t*>(tile)), TILE, TILE,
                      reinterpret_cast<uint32_t*>(wide + k * WEIGHTS));
        }
        asm volatile("" : : : "memory");
        const uint16_t* second = wide + (columns - 1) * tiles * WEIGHTS;  // again the first, if there is no other
        const Outputs outputs[] = {Outputs(p, column * TILE), Outputs(p, (column + columns - 1) * TILE)};
        for (int64_t row = 0; row < rows; row += 2 * TILE) {
            const uint16_t* upper = left.tiles + row / TILE * tiles * WEIGHTS;
            const uint16_t* lower = row + TILE < rows ? upper + tiles * WEIGHTS : upper;  // again the upper ones, if there are no more
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < tiles; k++) {
                _tile_loadd(4, upper + k * WEIGHTS, 64);
                _tile_loadd(6, wide + k * WEIGHTS, 64);
                ADD(0, 4, 6)
                _tile_loadd(7, second + k * WEIGHTS, 64);
                ADD(1, 4, 7)
                _tile_loadd(5, lower + k * WEIGHTS, 64);
                ADD(2, 5, 6)
                ADD(3, 5, 7)
            }
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + TILE * TILE, 64);
            _tile_stored(2, sums + 2 * TILE * TILE, 64);
            _tile_stored(3, sums + 3 * TILE * TILE, 64);
            for (int64_t i = 0; i < 2 * TILE && row + i < rows; i++) {
                const float* step = left.steps ? left.steps + row + i : nullptr;
                const uint32_t* mine = sums + (i / TILE * 2 * TILE + i % TILE) * TILE;
                for (int64_t c = 0; c < columns; c++)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (row + i) * p.outputs + (column + c) * TILE),
                                        outputs[c].of(mine + c * TILE * TILE, step));
            }
        }
    }
}

// Of up to MOST_GATED rows. What one thread makes of a gate and of what it gates never leaves that thread.
template <typename Format> void gated_product(const Product& p, const uint16_t* x, uint16_t* out, int64_t rows, Ahead& ahead) {
    const int64_t tiles = p.inputs / Format::INPUTS, count = (rows + TILE - 1) / TILE, width = p.outputs / 2;
    const Rows<Format, true> packed(x, rows, p.inputs);
    alignas(64) uint16_t ring[2 * RING * WEIGHTS];
    alignas(64) float sums[BLOCKS * TILE * TILE];
    alignas(64) bf16 gate[TILE], up[TILE];
    const int64_t each = 2 * ahead.left() * team_size() / (width / TILE) + 1;  // all within half of this thread's columns
#pragma omp for schedule(static) nowait
    for (int64_t output = 0; output < width; output += TILE) {
        ahead.fetch(each);
        const int64_t next = width / TILE * tiles * Format::BYTES;
        multiply<Format>(count, 2, packed.tiles, p.weight + output / TILE * tiles * Format::BYTES, next, tiles, ring, sums);
        for (int64_t block = 0; block < count; block++) {
            const float* steps = packed.steps ? packed.steps + block * TILE : nullptr;
            const Result gates(p, output, steps, sums + block * TILE * TILE);
            const Result ups(p, width + output, steps, sums + (count + block) * TILE * TILE);
            for (int64_t i = 0; i < TILE && block * TILE + i < rows; i++) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(gate), gates.of_row(i));
                _mm256_store_si256(reinterpret_cast<__m256i*>(up), ups.of_row(i));
                put_gated_lanes(reinterpret_cast<bf16*>(out + (block * TILE + i) * width + output), gate, up);
            }
        }
    }
}

// `of` with the format of the weight: in 16 bits as it is, in blocks of 8 or 4, or, with scales, in whole numbers of 8.
template <typename Function> void by_format(const Product& p, Function of) {
    if (p.scales && p.rounds_rows)
        of(Rough());
    else if (p.scales)
        of(Whole());
    else if (p.bits == 4)
        of(Block4());
    else if (p.bits == 8)
        of(Block8());
    else
        of(Wide());
}

constexpr int TRIES = 14;  // float16 numbers around an estimate: eight round to the same bfloat16

inline float number_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// The bits of x rounded to bfloat16, in the upper half.
inline uint32_t rounded(float x) {
    const uint32_t bits = bits_of(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
}

// Half the distance between bfloat16 numbers of this size.
inline float half_ulp(float x) { return number_of(bits_of(x) & 0x7f800000) / 256; }

struct Half {
    uint16_t bits;
    explicit Half(float x) : bits(_cvtss_sh(x, 0)) {}
    explicit Half(uint16_t x) : bits(x) {}
    operator float() const { return _cvtsh_ss(bits); }
    // The k-th nearest number, counted 0, 1, -1, 2, -2 ...
    Half near(int k) const { return Half(uint16_t(bits + (k % 2 ? (k + 1) / 2 : -k / 2))); }
};

// 32 weights of one output, and the block they were made of
struct Found {
    float weights[PAIRS], numbers[PAIRS];
    Half step{0.0f}, least{0.0f};

    explicit Found(const uint16_t* from) {
        for (int64_t i = 0; i < PAIRS; i++) weights[i] = from[i] == 0x8000 ? 0 : number_of(uint32_t(from[i]) << 16);  // -0 is 0
    }

    // Whether numbers from lowest to highest, times the step, plus the least, are the weights to the last bit.
    bool made_by(Half its_step, Half its_least, float lowest, float highest) {
        step = its_step, least = its_least;
        const float by = step != 0 ? 1 / step : 0;
        int wrong = 0;
        for (int64_t i = 0; i < PAIRS; i++) {
            const float number = std::nearbyint((weights[i] - least) * by);
            numbers[i] = number < lowest ? lowest : number > highest ? highest : number;
            wrong += rounded(numbers[i] * step + least) != bits_of(weights[i]);
        }
        return wrong == 0;
    }

    // Q8_0: the largest number is 127.
    bool eight_bits() {
        float largest = 0;
        for (float weight : weights) largest = std::fabs(weight) > largest ? std::fabs(weight) : largest;
        for (int k = 0; k < TRIES; k++)
            if (made_by(Half(largest / 127).near(k), Half(0.0f), -127, 127)) return true;
        return false;
    }

    // Q4_1: the least weight has number 0, the greatest 15. Q4_0: the largest one has number 0, and lies 8 steps from zero.
    bool four_bits() {
        float lowest = weights[0], highest = weights[0];
        for (float weight : weights) lowest = weight < lowest ? weight : lowest, highest = weight > highest ? weight : highest;
        for (int k = 0; k < TRIES; k++) {
            const Half origin = Half(lowest).near(k);
            if (rounded(origin) != bits_of(lowest)) continue;
            const Half middle(step_from(origin, highest));
            for (int near = 0; near < TRIES; near++)
                if (made_by(middle.near(near), origin, 0, 15)) return true;
        }
        const float largest = -lowest > highest ? lowest : highest;
        for (int k = 0; k < TRIES; k++) {
            const Half eighth = Half(largest / -8).near(k);
            if (made_by(eighth, Half(-8 * eighth), 0, 15)) return true;
        }
        return false;
    }

    // The middle of the steps by which no weight is further from a whole number of them than bfloat16 rounds.
    float step_from(float origin, float highest) const {
        const float by = highest > origin ? 15 / (highest - origin) : 0;
        float lower = 0, upper = highest > origin ? highest - origin : 0;
        for (float weight : weights) {
            const float number = std::nearbyint((weight - origin) * by), off = half_ulp(weight);
            const float above = number > 0 ? (weight - off - origin) / number : lower;
            const float below = number > 0 ? (weight + off - origin) / number : upper;
            lower = above > lower ? above : lower;
            upper = below < upper ? below : upper;
        }
        return (lower + upper) / 2;
    }
};

// One block of weight [outputs, inputs] for each output of each tile. False as soon as one is not found.
template <typename Format>
bool find(const uint16_t* weight, uint8_t* out, int64_t outputs, int64_t inputs) {
    constexpr bool FOUR = Format::BYTES < WEIGHTS;
    bool all = true;
#pragma omp parallel for schedule(static) reduction(&& : all)
    for (int64_t tile = 0; tile < outputs * inputs / WEIGHTS; tile++) {
        const int64_t column = tile * PAIRS / inputs * TILE, input = tile * PAIRS % inputs;
        uint8_t* to = out + tile * Format::BYTES;
        for (int64_t i = 0; all && i < TILE; i++) {
            Found block(weight + (column + i) * inputs + input);
            all = FOUR ? block.four_bits() : block.eight_bits();
            for (int64_t k = 0; k < PAIRS; k++) {
                const auto number = int8_t(block.numbers[k]);
                if (!FOUR)
                    to[i * PAIRS + k] = number;
                else if (uint8_t& both = to[i / 4 * 64 + 2 * k + i % 4 / 2]; i % 2 == 0)
                    both = number;
                else
                    both |= number << 4;
            }
            auto* steps = reinterpret_cast<uint16_t*>(to + (FOUR ? WEIGHTS / 2 : WEIGHTS));
            steps[i] = block.step.bits;
            if (FOUR) steps[TILE + i] = block.least.bits;
        }
    }
    return all;
}

}  // namespace

void share_product(const Product& p, const uint16_t* x, uint16_t* out, int64_t rows) {
    by_format(p, [&](auto format) {
        if (rows <= BLOCKS * TILE) return product<decltype(format)>(p, x, out, rows);
        for (int64_t first = 0; first < rows; first += MOST)
            long_product<decltype(format)>(p, x + first * p.inputs, out + first * p.outputs, rows - first < MOST ? rows - first : MOST);
    });
#pragma omp barrier
}

void share_gated_product(const Product& p, const uint16_t* x, uint16_t* out, int64_t rows, Ahead ahead) {
    by_format(p, [&](auto format) { gated_product<decltype(format)>(p, x, out, rows, ahead); });
#pragma omp barrier
}

extern "C" void tile_product(const uint16_t* x, const uint8_t* weight, const float* scales, const float* bias, uint16_t* out,
                             int64_t rows, int64_t inputs, int64_t outputs, int64_t bits, int64_t rounds_rows) {
#pragma omp parallel
    {
        const Tiles tiles;
        share_product({weight, scales, bias, inputs, outputs, bits, rounds_rows}, x, out, rows);
    }
}

// weight [outputs, inputs] -> out [outputs / 16, inputs / 32, bytes of a tile]. 0 where it was not made of such blocks.
extern "C" int64_t find_blocks(const uint16_t* weight, uint8_t* out, int64_t outputs, int64_t inputs, int64_t bits) {
    return bits == 4 ? find<Block4>(weight, out, outputs, inputs) : find<Block8>(weight, out, outputs, inputs);
}

#else

void share_product(const Product&, const uint16_t*, uint16_t*, int64_t) {}
void share_gated_product(const Product&, const uint16_t*, uint16_t*, int64_t, Ahead) {}
extern "C" void tile_product(const uint16_t*, const uint8_t*, const float*, const float*, uint16_t*, int64_t, int64_t, int64_t,
                             int64_t, int64_t) {}
extern "C" int64_t find_blocks(const uint16_t*, uint8_t*, int64_t, int64_t, int64_t) { return 0; }

#endif
