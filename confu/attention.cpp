// Attention over cached keys in bfloat16 for up to a thousand rows by AMX tiles, where the processor has them. Same arithmetic as
// the torch function in attention.py, which it is tested against. Built by native.py, called from there.
//
// The keys of a group of heads are cut into pieces. A piece and all query rows of its group are one task: scores by
// tiles, softmax of the piece alone, then the weighted values by tiles. In the end the pieces of a row are merged by
// their largest score and their sum of weights.
//
// The node of a tree sees its ancestors, which have others between them. All its sums are made in the order in which they
// would be if what it sees stood one key behind another, as it does where tokens are read one by one: by the same bits.

#include "tiles.h"

#include "layers.h"

#ifdef CONFU_TILES
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <utility>

// What a call needs beside its operands; of the thread that makes it, for all that take part.
struct AttentionRoom {
    std::vector<float> partial;  // results of pieces
    // Of each sequence, up to which key every row sees each from the soft prompts on; num_keys, where no row has gaps.
    std::vector<int64_t> common;
    std::vector<int64_t> seen;        // of each sequence, behind the last key that any row sees: a longer one may be beside it
    std::vector<int64_t> path, ends;  // the keys that each row sees behind the common ones, and where in `path` they end

    void find_paths(const uint8_t* mask, int64_t batch, int64_t rows, int64_t num_keys, int64_t lead) {
        common.assign(batch, num_keys);
        seen.assign(batch, 0);
        path.clear();
        ends.assign(batch * rows, 0);
        for (int64_t b = 0; b < batch; b++, mask += rows * num_keys) {
            int64_t least = num_keys;
            bool gaps = false;
            for (int64_t row = 0; row < rows; row++) {
                const uint8_t *sees = mask + row * num_keys, *end = sees + num_keys;
                if (const auto* last = static_cast<const uint8_t*>(memrchr(sees, 1, num_keys)))
                    seen[b] = std::max<int64_t>(seen[b], last - sees + 1);
                const auto* gap = static_cast<const uint8_t*>(std::memchr(sees + lead, 0, num_keys - lead));
                if (gap == nullptr) continue;
                gaps |= std::memchr(gap, 1, end - gap) != nullptr;
                least = std::min<int64_t>(least, gap - sees);
            }
            if (gaps) common[b] = least;
            for (int64_t row = 0; row < rows; row++) {
                for (int64_t key = common[b]; key < seen[b]; key++)
                    if (mask[row * num_keys + key]) path.push_back(key);
                ends[b * rows + row] = path.size();
            }
        }
    }
    std::pair<const int64_t*, int64_t> path_of(int64_t row) const {
        const int64_t start = row ? ends[row - 1] : 0;
        return {path.data() + start, ends[row] - start};
    }
};

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
    alignas(64) uint16_t queries[TILE * WIDEST], weights[TILE * PIECE], even_weights[TILE * PAIRS], odd_weights[TILE * PAIRS],
        later_weights[PIECE];
    alignas(64) float scores[TILE * PIECE], seen_scores[PIECE], whole[TILE * WIDEST], even[TILE * WIDEST], odd[TILE * WIDEST];
    std::vector<float> all_scores;  // of all query rows with the keys of the pieces of paths
};

struct Call {
    const uint16_t *queries, *keys, *values;
    const uint8_t* mask;
    int64_t heads, groups, rows, num_keys, lead, width, batch_stride, group_stride;
    float scale;
    const AttentionRoom& room;
    const uint16_t* queries_of(int64_t sequence, int64_t group) const {
        return queries + (sequence * heads + group * per_group()) * rows * width;
    }
    const uint16_t* keys_of(int64_t sequence, int64_t group) const { return keys + sequence * batch_stride + group * group_stride; }
    const uint16_t* values_of(int64_t sequence, int64_t group) const { return values + sequence * batch_stride + group * group_stride; }
    int64_t per_group() const { return heads / groups; }
    int64_t folded() const { return per_group() * rows; }  // query rows of a group
    // The first keys, soft prompts, are a piece of their own, so that they move no other's bounds.
    int64_t pieces() const { return (lead > 0) + (num_keys - lead + PIECE - 1) / PIECE; }
    int64_t first_of(int64_t piece) const { return lead == 0 ? piece * PIECE : piece == 0 ? 0 : lead + (piece - 1) * PIECE; }
    int64_t piece_of(int64_t key) const { return (lead > 0) + (key - lead) / PIECE; }
    int64_t end_of(int64_t piece) const { return piece + 1 < pieces() ? first_of(piece + 1) : num_keys; }
    // 16 query rows of a group, what is none of them included
    const uint16_t* tile_of(const uint16_t* queries, int64_t row, Scratch& s) const {
        const int64_t left = folded() - row;
        const uint16_t* tile = queries + row * width;
        return left < TILE ? static_cast<uint16_t*>(std::memcpy(s.queries, tile, left * width * 2)) : tile;
    }
    int64_t padded() const { return (folded() + TILE - 1) / TILE * TILE; }
};

void pack_keys(const uint16_t* keys, int64_t width, int64_t count, uint32_t* to) {
    for (int64_t key = 0; key < count; key += TILE)
        for (int64_t column = 0; column < width; column += PAIRS, to += TILE * TILE)
            transpose(reinterpret_cast<const uint32_t*>(keys + key * width + column), width / 2, count - key, to);
}

void pack_values(const uint16_t* values, int64_t width, int64_t count, uint32_t* to) {
    const auto row = [&](int64_t key, int64_t column) {
        return key < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(
                                 reinterpret_cast<const __m256i*>(values + key * width + column)))
                           : _mm512_setzero_si512();
    };
    for (int64_t key = 0; key < count; key += PAIRS)
        for (int64_t column = 0; column < width; column += TILE)
            for (int64_t i = 0; i < TILE; i++, to += TILE)
                _mm512_store_si512(to, _mm512_or_si512(row(key + 2 * i, column),
                                                       _mm512_slli_epi32(row(key + 2 * i + 1, column), 16)));
}

// scores of 16 query rows, `row` apart, with the keys of the piece, of 64 keys at a time
void score(const uint16_t* queries, int64_t width, int64_t count, const Scratch& s, float* scores, int64_t row) {
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
        _tile_stored(0, scores + key, row * 4);
        _tile_stored(1, scores + key + TILE, row * 4);
        _tile_stored(2, scores + key + 2 * TILE, row * 4);
        _tile_stored(3, scores + key + 3 * TILE, row * 4);
    }
}

// weights 2^(score - largest) of one row, and {largest, their sum}. A row that sees nothing of the piece has weights, too;
// merged with the others they count for nothing, as its largest says. Without a mask it sees all.
template <int TILES> void weigh(const float* scores, const uint8_t* mask, int64_t count, float factor, uint16_t* weights, float* stats) {
    const __m512 nowhere = _mm512_set1_ps(NOWHERE), by = _mm512_set1_ps(factor);
    __m512 scaled[TILES], most = nowhere, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < TILES; i++) {
        const int64_t left = count - i * TILE;
        const __mmask16 real = left >= TILE ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        const __m128i bytes = mask ? _mm_maskz_loadu_epi8(real, mask + i * TILE) : _mm_maskz_set1_epi8(real, 1);
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

// The same of the first `count` keys of the piece alone, in three summands as tiles make them: what their whole tiles make, and of
// those behind what the even and what the odd ones make.
void weighted_apart(Scratch& s, int64_t width, int64_t count) {
    const int64_t whole = count / PAIRS * PAIRS, left = count - whole;
    weighted(s, width, whole, s.whole);
    if (left == 0) {
        std::memset(s.even, 0, TILE * width * 4);
        std::memset(s.odd, 0, TILE * width * 4);
        return;
    }
    const __mmask16 evens = (1u << (left + 1) / 2) - 1, odds = (1u << left / 2) - 1;
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t i = 0; i < TILE; i++) {
        const __m512i pairs = _mm512_load_si512(s.weights + i * PIECE + whole);
        _mm512_store_si512(s.even_weights + i * PAIRS, _mm512_maskz_and_epi32(evens, pairs, low));
        _mm512_store_si512(s.odd_weights + i * PAIRS, _mm512_maskz_andnot_epi32(odds, low, pairs));
    }
    _tile_loadd(2, s.even_weights, PAIRS * 2);
    _tile_loadd(3, s.odd_weights, PAIRS * 2);
    for (int64_t column = 0; column < width; column += TILE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(4, s.values + whole / PAIRS * TILE * width + column * TILE, 64);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
        _tile_stored(0, s.even + column, width * 4);
        _tile_stored(1, s.odd + column, width * 4);
    }
}

inline __m512 widened(const uint16_t* from) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

// a + b, which -ffast-math may not take apart
inline __m512 plus(__m512 a, __m512 b) { return _mm512_add_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// The summands of one row, to which its keys at the places [from, to) of the piece are added as tiles would: of 32 the even ones
// and the odd ones apart. -> out [width]; without summands (null) it begins with these keys.
void add_path(const uint16_t* values, int64_t width, const int64_t* path, int64_t from, int64_t to, const uint16_t* weights,
              const float* whole, const float* even, const float* odd, float* out) {
    for (int64_t column = 0; column < width; column += TILE) {
        __m512 sum = _mm512_setzero_ps(), kinds[2] = {sum, sum};
        if (whole) sum = _mm512_load_ps(whole + column), kinds[0] = _mm512_load_ps(even + column), kinds[1] = _mm512_load_ps(odd + column);
        for (int64_t place = from; place < to; place++) {
            if (place % PAIRS == 0) sum = plus(sum, plus(kinds[0], kinds[1])), kinds[0] = kinds[1] = _mm512_setzero_ps();
            const __m512 weight = _mm512_castsi512_ps(_mm512_set1_epi32(uint32_t(weights[place]) << 16));
            kinds[place % 2] = _mm512_fmadd_ps(weight, widened(values + path[place - from] * width + column), kinds[place % 2]);
        }
        _mm512_storeu_ps(out + column, plus(sum, plus(kinds[0], kinds[1])));
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
    if (first >= c.room.seen[sequence]) {
        for (int64_t row = 0; row < c.folded(); row++) stats[2 * row] = NOWHERE;
        return;
    }
    pack_keys(c.keys_of(sequence, group) + first * c.width, c.width, count, s.keys);
    pack_values(c.values_of(sequence, group) + first * c.width, c.width, count, s.values);
    const uint16_t* queries = c.queries_of(sequence, group);
    const uint8_t* mask = c.mask + sequence * c.rows * c.num_keys + first;
    for (int64_t row = 0; row < c.folded(); row += TILE) {
        const int64_t left = c.folded() - row < TILE ? c.folded() - row : TILE;
        if (!any_seen(c, mask, row, left, count)) {
            for (int64_t i = 0; i < left; i++) stats[2 * (row + i)] = NOWHERE;
            continue;
        }
        score(c.tile_of(queries, row, s), c.width, count, s, s.scores, PIECE);
        for (int64_t i = 0; i < left; i++) {
            const auto* seen = mask + (row + i) % c.rows * c.num_keys;
            weigh_row(s.scores + i * PIECE, seen, count, c.scale, s.weights + i * PIECE, stats + 2 * (row + i));
        }
        weighted(s, c.width, count, partial + row * c.width);
    }
}

// The piece in which the keys that all rows see come to an end, and those after it: each row sees what it would if the others of its
// keys stood behind the common ones.
void attend_paths(const Call& c, int64_t sequence, int64_t group, Scratch& s, float* partial, float* stats) {
    const int64_t common = c.room.common[sequence], piece = c.piece_of(common), first = c.first_of(piece), count = common - first;
    const int64_t padded = c.padded(), end = c.room.seen[sequence], stride = (end - first + PIECE - 1) / PIECE * PIECE;
    const uint16_t *keys = c.keys_of(sequence, group), *values = c.values_of(sequence, group), *queries = c.queries_of(sequence, group);
    s.all_scores.resize(padded * stride);
    for (int64_t key = first; key < end; key += PIECE) {
        const int64_t some = std::min(PIECE, end - key);
        pack_keys(keys + key * c.width, c.width, some, s.keys);
        for (int64_t row = 0; row < c.folded(); row += TILE)
            score(c.tile_of(queries, row, s), c.width, some, s, s.all_scores.data() + row * stride + key - first, stride);
    }
    pack_values(values + first * c.width, c.width, count, s.values);
    for (int64_t row = 0; row < c.folded(); row += TILE) {
        const int64_t left = std::min(TILE, c.folded() - row);
        const auto path_of = [&](int64_t i) { return c.room.path_of(sequence * c.rows + (row + i) % c.rows); };
        for (int64_t i = 0; i < left; i++) {
            const auto [path, length] = path_of(i);
            const float* scores = s.all_scores.data() + (row + i) * stride;
            std::copy_n(scores, count, s.seen_scores);
            for (int64_t part = 0; piece + part < c.pieces(); part++) {
                const int64_t from = part * PIECE, seen = std::min(PIECE, count + length - from), at = part * padded + row + i;
                stats[2 * at] = NOWHERE;
                if (seen <= 0) continue;
                for (int64_t place = part ? 0 : count; place < seen; place++) s.seen_scores[place] = scores[path[from + place - count] - first];
                uint16_t* weights = part ? s.later_weights : s.weights + i * PIECE;
                WEIGH[(seen - 1) / PAIRS](s.seen_scores, nullptr, seen, c.scale, weights, stats + 2 * at);
                if (part) add_path(values, c.width, path + from - count, 0, seen, weights, nullptr, nullptr, nullptr, partial + at * c.width);
            }
        }
        weighted_apart(s, c.width, count);
        for (int64_t i = 0; i < left; i++) {
            const auto [path, length] = path_of(i);
            add_path(values, c.width, path, count, std::min(PIECE, count + length), s.weights + i * PIECE, s.whole + i * c.width,
                     s.even + i * c.width, s.odd + i * c.width, partial + (row + i) * c.width);
        }
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

AttentionRoom* attention_room(const uint8_t* mask, int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t num_keys,
                              int64_t lead, int64_t width) {
    static thread_local AttentionRoom room;
    const Call c{nullptr, nullptr, nullptr, mask, heads, groups, rows, num_keys, lead, width, 0, 0, 0, room};
    const size_t count = batch * groups * c.pieces() * c.padded() * (width + 2);
    if (room.partial.size() < count) room.partial.resize(count);
    room.find_paths(mask, batch, rows, num_keys, lead);
    return &room;
}

void share_attention(const uint16_t* queries, const uint16_t* keys, const uint16_t* values, const uint8_t* mask, uint16_t* out,
                     int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t num_keys, int64_t lead, int64_t width,
                     int64_t batch_stride, int64_t group_stride, float scale, AttentionRoom* room) {
    const Call c{queries, keys, values, mask, heads, groups, rows, num_keys, lead, width, batch_stride, group_stride, scale, *room};
    const int64_t pieces = c.pieces(), padded = c.padded();
    float *partial = room->partial.data(), *stats = partial + batch * groups * pieces * padded * width;
    static thread_local Scratch scratch;
    // Neighbouring tasks and rows go to one thread: most of what it merges it has made itself.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * groups * pieces; task++) {
        const int64_t pair = task / pieces, piece = task % pieces, sequence = pair / groups, common = room->common[sequence];
        float *its = partial + task * padded * width, *its_stats = stats + task * padded * 2;
        if (common == num_keys || piece < c.piece_of(common))
            attend_piece(c, sequence, pair % groups, piece, scratch, its, its_stats);
        else if (piece == c.piece_of(common))
            attend_paths(c, sequence, pair % groups, scratch, its, its_stats);
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
    AttentionRoom* room = attention_room(mask, batch, heads, groups, rows, num_keys, lead, width);
#pragma omp parallel
    {
        const Tiles tiles;
        share_attention(queries, keys, values, mask, out, batch, heads, groups, rows, num_keys, lead, width, batch_stride,
                        group_stride, scale, room);
    }
}

#else

AttentionRoom* attention_room(const uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) { return nullptr; }
void share_attention(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t, int64_t, int64_t,
                     int64_t, int64_t, int64_t, int64_t, int64_t, float, AttentionRoom*) {}
extern "C" int64_t tiles_granted() { return 0; }
extern "C" void attention_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t,
                               int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float) {}

#endif
