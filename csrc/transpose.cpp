// Transposes of matrices that lie one behind the other: a tensor in another memory layout.

#include "bindings.hpp"
#include "processor.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace py = pybind11;

namespace {

constexpr std::int64_t GRAIN = 1 << 13;          // elements that a thread is worth waking for
constexpr std::int64_t LONG = 64, SHORT = 16;    // elements of a block's sides

// Four rows of four elements.
template <class T>
INLINE void transpose_four(const T* from, std::int64_t columns, T* to, std::int64_t rows) {
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
    typedef T Vector __attribute__((vector_size(4 * sizeof(T))));
    Vector a, b, c, d;
    std::memcpy(&a, from, sizeof a);
    std::memcpy(&b, from + columns, sizeof b);
    std::memcpy(&c, from + 2 * columns, sizeof c);
    std::memcpy(&d, from + 3 * columns, sizeof d);
    const Vector ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Vector cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
    std::memcpy(to, &a, sizeof a);
    std::memcpy(to + rows, &b, sizeof b);
    std::memcpy(to + 2 * rows, &c, sizeof c);
    std::memcpy(to + 3 * rows, &d, sizeof d);
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[j * rows + i] = from[i * columns + j];
#endif
}

// Along the longer side, so that what is written to, or read from, again and again does not lie a power of two apart.
template <class T>
INLINE void transpose_block(const T* from, std::int64_t columns, T* to, std::int64_t rows, std::int64_t high,
                            std::int64_t wide, bool tall) {
    const std::int64_t whole = high - high % 4, full = wide - wide % 4;
    if (tall)
        for (std::int64_t j = 0; j < full; j += 4)
            for (std::int64_t i = 0; i < whole; i += 4) transpose_four(from + i * columns + j, columns, to + j * rows + i, rows);
    else
        for (std::int64_t i = 0; i < whole; i += 4)
            for (std::int64_t j = 0; j < full; j += 4) transpose_four(from + i * columns + j, columns, to + j * rows + i, rows);
    for (std::int64_t j = full; j < wide; ++j)
        for (std::int64_t i = 0; i < high; ++i) to[j * rows + i] = from[i * columns + j];
    for (std::int64_t i = whole; i < high; ++i)
        for (std::int64_t j = 0; j < full; ++j) to[j * rows + i] = from[i * columns + j];
}

// Blocks of all matrices, of which every thread takes a share: those of a strip of long rows, or of columns, in a row.
template <class T>
struct Job {
    const T* from;
    T* to;
    std::int64_t matrices, rows, columns, shares;
    std::atomic<std::int64_t> next;

    static void part(void* data);

    INLINE void share(std::int64_t number) const {
        const bool tall = rows > columns;
        const std::int64_t high = tall ? LONG : SHORT, wide = tall ? SHORT : LONG;
        const std::int64_t down = (rows + high - 1) / high, across = (columns + wide - 1) / wide;
        const std::int64_t inner = tall ? across : down, each = down * across, total = matrices * each;
        for (std::int64_t k = number * total / shares; k < (number + 1) * total / shares; ++k) {
            const std::int64_t at = k / each * rows * columns, outer = k % each / inner, other = k % inner;
            const std::int64_t i = (tall ? outer : other) * high, j = (tall ? other : outer) * wide;
            transpose_block(from + at + i * columns + j, columns, to + at + j * rows + i, rows, std::min(high, rows - i),
                            std::min(wide, columns - j), tall);
        }
    }
};

FOR_EACH_ISA void take(const Job<std::uint32_t>& job, std::int64_t number) { job.share(number); }
FOR_EACH_ISA void take(const Job<std::uint64_t>& job, std::int64_t number) { job.share(number); }

template <class T>
void Job<T>::part(void* data) {
    auto& job = *static_cast<Job*>(data);
    for (std::int64_t number; (number = job.next.fetch_add(1)) < job.shares;) take(job, number);
}

template <class T>
void transpose_typed(std::uintptr_t from, std::uintptr_t to, std::int64_t matrices, std::int64_t rows,
                     std::int64_t columns, unsigned threads) {
    const auto shares = std::clamp<std::int64_t>(matrices * rows * columns / GRAIN, 1, threads);
    Job<T> job{reinterpret_cast<const T*>(from), reinterpret_cast<T*>(to), matrices, rows, columns, shares, {0}};
    in_parallel(&Job<T>::part, &job, static_cast<unsigned>(shares));
}

void transpose(std::uintptr_t from, std::uintptr_t to, std::int64_t matrices, std::int64_t rows, std::int64_t columns,
               std::int64_t itemsize, unsigned threads) {
    if (itemsize != 4 && itemsize != 8) throw std::invalid_argument("elements have 4 or 8 bytes");
    py::gil_scoped_release release;
    (itemsize == 4 ? transpose_typed<std::uint32_t> : transpose_typed<std::uint64_t>)(from, to, matrices, rows, columns,
                                                                                     std::max(threads, 1u));
}

}  // namespace

void bind_transpose(py::module_& m) {
    m.def("transpose", &transpose, py::arg("source"), py::arg("target"), py::arg("matrices"), py::arg("rows"),
          py::arg("columns"), py::arg("itemsize"), py::arg("threads"),
          "Write the transposes of dense matrices at one address to another.");
}
