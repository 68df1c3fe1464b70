// Attention over cached keys in bfloat16 for a few dozen rows by AMX tiles, where the processor has them. Same arithmetic as
// the torch function in attention.py, which it is tested against. Built by native.py, called from there.
//
// The keys of a group of heads are cut into pieces. A piece and all query rows of its group are one task: scores by
// tiles, softmax of the piece alone, then the weighted values by tiles. In the end the pieces of a row are merged by
// their largest score and their sum of weights.

#include "tiles.h"

#include "layers.h"

#ifdef CONFU_TILES
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>

namespace {

constexpr int64_t PIECE = 128;   // keys of a task: what a row sees is summed in the same order whatever stands behind it
constexpr int64_t WIDEST = 256;  // of a head
constexpr float NOWHERE = -1e30f;

// 2^x for x <= 0, to four parts in a million
inline __m512 exp2_of(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(9.67604e-3f);  // fitted to 2^x from -1/2 to 1/2
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.592208e-2f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022107e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9312103e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

struct Scratch {  // of one thread
    alignas(64) uint32_t keys[PIECE * WIDEST / 2], values[PIECE * WIDEST / 2];
    alignas(64) uint16_t queries[TILE * WIDEST], weights[TILE * PIECE];
    alignas(64) float scores[TILE * PIECE];
};

struct Call {
    const uint16_t *queries, *keys, *values;
    const uint8_t* mask;
    int64_t heads, groups, rows, num_keys, lead, width, batch_stride, group_stride;
    float scale;
    int64_t per_group() const { return heads / groups; }
    int64_t folded() const { return per_group() * rows; }  // query rows of a group
    // The first keys, soft prompts, are a piece of their own, so that they move no other's bounds.
    int64_t pieces() const { return (lead > 0) + (num_keys - lead + PIECE - 1) / PIECE; }
    int64_t first_of(int64_t piece) const { return lead == 0 ? piece * PIECE : piece == 0 ? 0 : lead + (piece - 1) * PIECE; }
    int64_t end_of(int64_t piece) const { return piece + 1 < pieces() ? first_of(piece + 1) : num_keys; }
    int64_t padded() const { return (folded() + TILE - 1) / TILE * TILE; }
};

void pack(const Call& c, int64_t sequence, int64_t group, int64_t first, int64_t count, Scratch& s) {
    const int64_t offset = sequence * c.batch_stride + group * c.group_stride + first * c.width;
    const uint16_t *keys = c.keys + offset, *values = c.values + offset;
    uint32_t* to = s.keys;
    for (int64_t key = 0; key < count; key += TILE)
        for (int64_t column = 0; column < c.width; column += PAIRS, to += TILE * TILE)
            transpose(reinterpret_cast<const uint32_t*>(keys + key * c.width + column), c.width / 2, count - key, to);
    to = s.values;
    const auto row = [&](int64_t key, int64_t column) {
        return key < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(
                                 reinterpret_cast<const __m256i*>(values + key * c.width + column)))
                           : _mm512_setzero_si512();
    };
    for (int64_t key = 0; key < count; key += PAIRS)
        for (int64_t column = 0; column < c.width; column += TILE)
            for (int64_t i = 0; i < TILE; i++, to += TILE)
                _mm512_store_si512(to, _mm512_or_si512(row(key + 2 * i, column),
                                                       _mm512_slli_epi32(row(key + 2 * i + 1, column), 16)));
}

// scores of 16 query rows with the keys of the piece, of 64 keys at a time
void score(const uint16_t* queries, int64_t width, int64_t count, Scratch& s) {
    const int64_t stride = width / PAIRS * TILE * TILE;  // of a tile's keys
    for (int64_t key = 0; key < count; key += 4 * TILE) {
        const uint32_t* keys = s.keys + key / TILE * stride;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t column = 0; column < width; column += PAIRS, keys += TILE * TILE) {
            _tile_loadd(4, queries + column, width * 2);
            _tile_loadd(5, keys, 64);
            _tile_loadd(6, keys + stride, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(5, keys + 2 * stride, 64);
            _tile_loadd(6, keys + 3 * stride, 64);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, s.scores + key, PIECE * 4);
        _tile_stored(1, s.scores + key + TILE, PIECE * 4);
        _tile_stored(2, s.scores + key + 2 * TILE, PIECE * 4);
        _tile_stored(3, s.scores + key + 3 * TILE, PIECE * 4);
    }
}

// weights 2^(score - largest) of one row, and {largest, their sum}. A row that sees nothing of the piece has weights, too;
// merged with the others they count for nothing, as its largest says.
template <int TILES> void weigh(const float* scores, const uint8_t* mask, int64_t count, float factor, uint16_t* weights, float* stats) {
    const __m512 nowhere = _mm512_set1_ps(NOWHERE), by = _mm512_set1_ps(factor);
    __m512 scaled[TILES], most = nowhere, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < TILES; i++) {
        const int64_t left = count - i * TILE;
        const __mmask16 real = left >= TILE ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        const __m128i bytes = _mm_maskz_loadu_epi8(real, mask + i * TILE);
        scaled[i] = _mm512_mask_mul_ps(nowhere, _mm_test_epi8_mask(bytes, bytes), _mm512_load_ps(scores + i * TILE), by);
        most = _mm512_max_ps(most, scaled[i]);
    }
    stats[0] = _mm512_reduce_max_ps(most);
    const __m512 largest = _mm512_set1_ps(stats[0]);
    for (int64_t i = 0; i < TILES; i++) {
        const __m512 weight = exp2_of(_mm512_sub_ps(scaled[i], largest));
        sum = _mm512_add_ps(sum, weight);
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights + i * TILE), __m256i(_mm512_cvtneps_pbh(weight)));
    }
    stats[1] = _mm512_reduce_add_ps(sum);
}

// weights [16, count] times values [count, width] -> out [16, width], float32
void weighted(const Scratch& s, int64_t width, int64_t count, float* out) {
    for (int64_t column = 0; column < width; column += 2 * TILE) {
        const uint32_t* values = s.values + column * TILE;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t key = 0; key < count; key += PAIRS, values += TILE * width) {
            _tile_loadd(2, s.weights + key, PIECE * 2);
            _tile_loadd(3, values, 64);
            _tile_loadd(4, values + TILE * TILE, 64);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, out + column, width * 4);
        _tile_stored(1, out + column + TILE, width * 4);
    }
}

// For as many keys as a piece can have, by pairs of tiles.
constexpr decltype(&weigh<2>) WEIGH[] = {weigh<2>, weigh<4>, weigh<6>, weigh<8>};
static_assert(sizeof(WEIGH) / sizeof(*WEIGH) == PIECE / PAIRS);

// Whether any of `left` query rows from `row` on sees any key of the piece: in a long prompt half of them do not.
bool any_seen(const Call& c, const uint8_t* mask, int64_t row, int64_t left, int64_t count) {
    for (int64_t i = 0; i < left; i++)
        if (std::memchr(mask + (row + i) % c.rows * c.num_keys, 1, count)) return true;
    return false;
}

// one piece of one group: partial results [folded, width] and {largest, sum} of every row
void attend_piece(const Call& c, int64_t sequence, int64_t group, int64_t piece, Scratch& s, float* partial, float* stats) {
    const int64_t first = c.first_of(piece), count = c.end_of(piece) - first;
    const auto weigh_row = WEIGH[(count - 1) / PAIRS];
    pack(c, sequence, group, first, count, s);
    const uint16_t* queries = c.queries + (sequence * c.heads + group * c.per_group()) * c.rows * c.width;
    const uint8_t* mask = c.mask + sequence * c.rows * c.num_keys + first;
    for (int64_t row = 0; row < c.folded(); row += TILE) {
        const int64_t left = c.folded() - row < TILE ? c.folded() - row : TILE;
        if (!any_seen(c, mask, row, left, count)) {
            for (int64_t i = 0; i < left; i++) stats[2 * (row + i)] = NOWHERE;
            continue;
        }
        const uint16_t* tile = queries + row * c.width;
        if (left < TILE) tile = static_cast<uint16_t*>(std::memcpy(s.queries, tile, left * c.width * 2));
        score(tile, c.width, count, s);
        for (int64_t i = 0; i < left; i++) {
            const auto* seen = mask + (row + i) % c.rows * c.num_keys;
            weigh_row(s.scores + i * PIECE, seen, count, c.scale, s.weights + i * PIECE, stats + 2 * (row + i));
        }
        weighted(s, c.width, count, partial + row * c.width);
    }
}

// the pieces of one query row, each `stride` rows behind the one before
void merge(const float* partial, const float* stats, int64_t pieces, int64_t stride, int64_t width, uint16_t* out) {
    float largest = NOWHERE, total = 0;
    for (int64_t p = 0; p < pieces; p++) largest = std::fmax(largest, stats[2 * p * stride]);
    alignas(64) float sum[WIDEST] = {};
    for (int64_t p = 0; p < pieces; p++) {
        if (stats[2 * p * stride] <= NOWHERE) continue;  // nothing was written
        const float factor = std::exp2(stats[2 * p * stride] - largest);
        total += factor * stats[2 * p * stride + 1];
        for (int64_t i = 0; i < width; i++) sum[i] += factor * partial[p * stride * width + i];
    }
    const __m512 by = _mm512_set1_ps(total > 0 ? 1 / total : 0);
    for (int64_t i = 0; i < width; i += TILE)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            __m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(sum + i), by))));
}

}  // namespace

extern "C" int64_t tiles_granted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

int64_t attention_room(int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t num_keys, int64_t lead, int64_t width) {
    const Call c{nullptr, nullptr, nullptr, nullptr, heads, groups, rows, num_keys, lead, width, 0, 0, 0};
    return batch * groups * c.pieces() * c.padded() * (width + 2);
}

float* attention_memory(int64_t count) {
    static thread_local std::vector<float> memory;
    if (memory.size() < size_t(count)) memory.resize(count);
    return memory.data();
}

void share_attention(const uint16_t* queries, const uint16_t* keys, const uint16_t* values, const uint8_t* mask, uint16_t* out,
                     int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t num_keys, int64_t lead, int64_t width,
                     int64_t batch_stride, int64_t group_stride, float scale, float* room) {
    const Call c{queries, keys, values, mask, heads, groups, rows, num_keys, lead, width, batch_stride, group_stride, scale};
    const int64_t pieces = c.pieces(), padded = c.padded();
    float *partial = room, *stats = room + batch * groups * pieces * padded * width;
    static thread_local Scratch scratch;
    // Neighbouring tasks and rows go to one thread: most of what it merges it has made itself.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * groups * pieces; task++) {
        const int64_t pair = task / pieces;
        attend_piece(c, pair / groups, pair % groups, task % pieces, scratch, partial + task * padded * width,
                     stats + task * padded * 2);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch * heads * rows; row++) {
        const int64_t pair = row / c.folded(), at = row % c.folded(), first = pair * pieces * padded + at;
        const int64_t head = pair % groups * c.per_group() + at / rows;
        merge(partial + first * width, stats + first * 2, pieces, padded, width,
              out + ((pair / groups * rows + at % rows) * heads + head) * width);
    }
}

// queries [batch, heads, rows, width]; keys and values [batch, groups, num_keys, width] with the given strides; mask
// [batch, rows, num_keys] -> out [batch, rows, heads, width]; the first `lead` keys are soft prompts, PIECE of them at most; width is a
// multiple of 32, scale holds log2(e)
extern "C" void attention_bf16(const uint16_t* queries, const uint16_t* keys, const uint16_t* values, const uint8_t* mask,
                               uint16_t* out, int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t num_keys,
                               int64_t lead, int64_t width, int64_t batch_stride, int64_t group_stride, float scale) {
    float* room = attention_memory(attention_room(batch, heads, groups, rows, num_keys, lead, width));
#pragma omp parallel
    {
        const Tiles tiles;
        share_attention(queries, keys, values, mask, out, batch, heads, groups, rows, num_keys, lead, width, batch_stride,
                        group_stride, scale, room);
    }
}

#else

int64_t attention_room(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }
float* attention_memory(int64_t) { return nullptr; }
void share_attention(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t, int64_t, int64_t,
                     int64_t, int64_t, int64_t, int64_t, int64_t, float, float*) {}
extern "C" int64_t tiles_granted() { return 0; }
extern "C" void attention_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t,
                               int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float) {}

#endif
