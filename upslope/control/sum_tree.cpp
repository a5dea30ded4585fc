// What sum_tree.py does in NumPy, the same additions in the same order: its results are NumPy's to the last bit.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t FAN_OUT = 16;

double below(double rest, double total) { return std::min(rest, total * (1 - 0x1p-52)); }

// How many of these rising numbers are at most x, without branches that could be guessed wrong.
int64_t after(const double* rising, int64_t count, double x) {
    const double* base = rising;
    while (count > 1) {
        const int64_t half = count / 2;
        base += (base[half - 1] <= x) * half;
        count -= half;
    }
    return base - rising + (*base <= x);
}

// Where a call's numbers lie: indices, which `find` writes, their priorities or shares, and room for its own.
struct Room {
    int64_t* index;
    const double* value;
    double* rest;
    double* sums;  // as many as the top has nodes
};

}  // namespace

extern "C" {

// Leaves first, each in its turn, then the sums above them, level by level. False where an index is none of a leaf.
bool set(double* const* levels, int64_t depth, int64_t leaves, const Room* room, int64_t count) {
    const int64_t* index = room->index;
    for (int64_t i = 0; i < count; ++i) {
        if (index[i] < 0 || index[i] >= leaves) return false;
    }
    for (int64_t i = 0; i < count; ++i) levels[0][index[i]] = room->value[i];
    int64_t families = FAN_OUT;
    for (int64_t level = 1; level <= depth; ++level, families *= FAN_OUT) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t node = index[i] / families;
            const double* family = levels[level - 1] + node * FAN_OUT;
            double sum = 0;
            for (int64_t child = 0; child < FAN_OUT; ++child) sum += family[child];
            levels[level][node] = sum;
        }
    }
    return true;
}

// levels[depth] is the top, `width` nodes. Returns the total. All shares go down a level before any goes down the next:
// the processor then waits for many memory accesses at once.
double find(double* const* levels, int64_t depth, int64_t width, const Room* room, int64_t count) {
    const auto [leaf, share, rest, sums] = *room;
    double total = 0;
    for (int64_t node = 0; node < width; ++node) sums[node] = total += levels[depth][node];
    if (!(total > 0)) return total;
    for (int64_t i = 0; i < count; ++i) {
        rest[i] = share[i] * total;
        const int64_t node = after(sums, width, below(rest[i], total));
        if (node > 0) rest[i] -= sums[node - 1];
        leaf[i] = node;
    }
    for (int64_t level = depth; level-- > 0;) {
        for (int64_t i = 0; i < count; ++i) {
            const double* family = levels[level] + leaf[i] * FAN_OUT;
            double prefix[FAN_OUT + 1] = {0};
            for (int64_t child = 0; child < FAN_OUT; ++child) prefix[child + 1] = prefix[child] + family[child];
            const double left = below(rest[i], prefix[FAN_OUT]);
            int64_t child = 0;
            for (int64_t k = 1; k <= FAN_OUT; ++k) child += prefix[k] <= left;
            rest[i] = left - prefix[child];
            leaf[i] = leaf[i] * FAN_OUT + child;
            if (level > 0) {
                __builtin_prefetch(levels[level - 1] + leaf[i] * FAN_OUT);
                __builtin_prefetch(levels[level - 1] + leaf[i] * FAN_OUT + FAN_OUT / 2);
            }
        }
    }
    return total;
}
}
