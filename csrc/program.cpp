// Programs: a list of instructions on registers, run over all elements of some tensors in one pass. Most work element by
// element; some on rows of elements that lie beside each other, which are then taken whole.
// Elements are taken in pieces that stay in the first-level cache, so only operands and results move through memory.
// Knows pointers, sizes and strides; nothing of torch, whose thread pool is found at run time (see processor.hpp).

#include "bindings.hpp"
#include "processor.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace py = pybind11;

namespace {

// The instructions: name, and what element i of the result is, of arguments a, b, c and a number k.
#define INSTRUCTIONS(X)                      \
    X(fill, k)                               \
    X(add, a[i] + b[i])                      \
    X(sub, a[i] - b[i])                      \
    X(mul, a[i] * b[i])                      \
    X(div, a[i] / b[i])                      \
    X(fma, a[i] * b[i] + c[i])               \
    X(fnma, c[i] - a[i] * b[i])              \
    X(add_i, a[i] + k)                       \
    X(mul_i, a[i] * k)                       \
    X(rsub_i, k - a[i])                      \
    X(rdiv_i, k / a[i])                      \
    X(gt_i, a[i] > k ? T(1) : T(0))          \
    X(ge_i, a[i] >= k ? T(1) : T(0))         \
    X(lt_i, a[i] < k ? T(1) : T(0))          \
    X(le_i, a[i] <= k ? T(1) : T(0))         \
    X(where, a[i] != T(0) ? b[i] : c[i])     \
    X(exp, exp_of(a[i]))                     \
    X(log, std::log(a[i]))                   \
    X(sqrt, std::sqrt(a[i]))                 \
    X(tanh, tanh_of(a[i]))                   \
    X(sigmoid, sigmoid_of(a[i]))             \
    X(erf, erf_of(a[i]))                     \
    X(abs, a[i] < 0 ? -a[i] : a[i])

// Those on rows: name, and what every element of a row of the result is, of the sum and the length of that of a.
#define ROW_INSTRUCTIONS(X) \
    X(row_sum, sum)         \
    X(row_mean, sum / static_cast<T>(row))

#define NUMBER(name, value) OP_##name,
enum Op : std::int64_t { INSTRUCTIONS(NUMBER) ELEMENTWISE_OPS, LAST = ELEMENTWISE_OPS - 1, ROW_INSTRUCTIONS(NUMBER) OPS };
#undef NUMBER
#define NAME(name, value) #name,
const char* const NAMES[OPS] = {INSTRUCTIONS(NAME) ROW_INSTRUCTIONS(NAME)};
#undef NAME

struct Instruction {
    std::int64_t op, to, a, b, c;
    double number;
};

struct Operand {
    std::uintptr_t address;
    std::vector<std::int64_t> strides;  // in elements, per axis
};

constexpr std::int64_t PIECE = 512;      // elements of a register
constexpr std::int64_t GRAIN = 1 << 15;  // elements that a thread is worth waking for

// Functions of one float, to about an ulp or two and free of branches, so that loops over them become vector code.
// exp: Cody and Waite's reduction and the polynomial of Cephes' expf; 2ⁿ in two factors, as one may be out of range.
INLINE float power_of_two(std::int32_t n) {
    const std::int32_t bits = (n + 127) * (1 << 23);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

INLINE float exp_of(float x) {
    const float low = -104.0f, high = 88.7228391f;
    const float y = x < low ? low : x > high ? high : x;
    const float n = (y * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const std::int32_t whole = static_cast<std::int32_t>(n), half = whole / 2;
    p = p * power_of_two(half) * power_of_two(whole - half);
    return x < low ? 0.0f : x > high ? std::numeric_limits<float>::infinity() : p;
}

// tanh: Cephes' tanhf, an odd polynomial near zero and exp beyond.
INLINE float tanh_of(float x) {
    const float z = x * x, size = x < 0 ? -x : x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float near = p * z * x + x;
    const float far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
    return size < 0.625f ? near : x < 0 ? -far : far;
}

INLINE float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// erf: x P(x²)/Q(x²) on [-4, 4], beyond which it is ±1 in single precision (coefficients as in Eigen and XLA).
INLINE float erf_of(float x) {
    const float y = x < -4.0f ? -4.0f : x > 4.0f ? 4.0f : x, z = y * y;
    float p = -2.72614225801306e-10f;
    p = p * z + 2.77068142495902e-08f;
    p = p * z - 2.10102402082508e-06f;
    p = p * z - 5.69250639462346e-05f;
    p = p * z - 7.34990630326855e-04f;
    p = p * z - 2.95459980854025e-03f;
    p = p * z - 1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * z - 2.13374055278905e-04f;
    q = q * z - 1.68282697438203e-03f;
    q = q * z - 7.37332916720468e-03f;
    q = q * z - 1.42647390514189e-02f;
    return y * p / q;
}

INLINE double exp_of(double x) { return std::exp(x); }
INLINE double tanh_of(double x) { return std::tanh(x); }
INLINE double sigmoid_of(double x) { return 1.0 / (1.0 + std::exp(-x)); }
INLINE double erf_of(double x) { return std::erf(x); }

// In several sums at a time: vector code, and errors that grow with a fraction of the length.
template <class T>
INLINE T sum_of(const T* a, std::int64_t n) {
    constexpr std::int64_t LANES = 128 / sizeof(T);
    T lanes[LANES] = {};
    std::int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (std::int64_t k = 0; k < LANES; ++k) lanes[k] += a[i + k];
    for (; i < n; ++i) lanes[i % LANES] += a[i];
    for (std::int64_t width = LANES / 2; width > 0; width /= 2)
        for (std::int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    return lanes[0];
}

template <class T>
INLINE void execute(const std::vector<Instruction>& program, T* const* at, std::int64_t n, std::int64_t row) {
    for (const Instruction& one : program) {
        T* to = at[one.to];
        const T *a = at[one.a], *b = at[one.b], *c = at[one.c];
        const T k = static_cast<T>(one.number);
        switch (one.op) {
#define CASE(name, value)                                           \
    case OP_##name:                                                 \
        _Pragma("GCC ivdep") for (std::int64_t i = 0; i < n; ++i) { \
            to[i] = (value);                                        \
        }                                                           \
        break;
            INSTRUCTIONS(CASE)
#undef CASE
#define CASE(name, value)                                   \
    case OP_##name:                                         \
        for (std::int64_t i = 0; i < n; i += row) {         \
            const T sum = sum_of(a + i, row), all = (value); \
            std::fill(to + i, to + i + row, all);           \
        }                                                   \
        break;
            ROW_INSTRUCTIONS(CASE)
#undef CASE
            default: break;
        }
    }
}

FOR_EACH_ISA void execute_one(const std::vector<Instruction>& program, float* const* at, std::int64_t n, std::int64_t row) {
    execute(program, at, n, row);
}
FOR_EACH_ISA void execute_one(const std::vector<Instruction>& program, double* const* at, std::int64_t n, std::int64_t row) {
    execute(program, at, n, row);
}

// How many elements, counted in the order of the axes, lie beside each other wherever such a run begins.
std::int64_t run_length(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides) {
    std::int64_t length = 1;
    for (std::size_t d = sizes.size(); d-- > 0;) {
        if (sizes[d] != 1 && strides[d] != length) break;
        length *= sizes[d];
    }
    return length;
}

// Where element number k, counted in the order of the axes, lies.
std::int64_t offset_of(const Operand& from, const std::vector<std::int64_t>& sizes, std::int64_t k) {
    std::int64_t offset = 0;
    for (std::size_t d = sizes.size(); d-- > 0;) {
        offset += k % sizes[d] * from.strides[d];
        k /= sizes[d];
    }
    return offset;
}

// Copy elements [begin, begin + n), counted in the order of the axes, into a register.
template <class T>
void gather(const Operand& from, const std::vector<std::int64_t>& sizes, std::int64_t begin, std::int64_t n, T* to) {
    const std::size_t axes = sizes.size();
    std::vector<std::int64_t> place(axes, 0);
    std::int64_t offset = 0, rest = begin;
    for (std::size_t d = axes; d-- > 0;) {
        place[d] = rest % sizes[d];
        rest /= sizes[d];
        offset += place[d] * from.strides[d];
    }
    const T* data = reinterpret_cast<const T*>(from.address);
    const std::int64_t last = axes ? sizes[axes - 1] : 1, step = axes ? from.strides[axes - 1] : 0;
    std::int64_t column = axes ? place[axes - 1] : 0;
    for (std::int64_t done = 0; done < n;) {
        const std::int64_t run = std::min(last - column, n - done);
        const T* row = data + offset;
        if (step == 1) std::memcpy(to + done, row, run * sizeof(T));
        else if (step == 0) std::fill(to + done, to + done + run, *row);
        else for (std::int64_t i = 0; i < run; ++i) to[done + i] = row[i * step];
        done += run;
        if (done == n) break;
        offset -= column * step;
        column = 0;
        for (std::size_t d = axes - 1; d-- > 0;) {  // the next row
            offset += from.strides[d];
            if (++place[d] < sizes[d]) break;
            offset -= sizes[d] * from.strides[d];
            place[d] = 0;
        }
    }
}

// How the elements of an operand are come by: where a piece of them lies, or copied into a register.
template <class T>
class Reader {
public:
    Reader(const Operand& from, const std::vector<std::int64_t>& sizes, std::int64_t row)
        : from_(from), sizes_(sizes), row_(row), run_(run_length(sizes, from.strides)) {
        std::size_t axes = sizes.size();
        for (std::int64_t inner = 1; axes > 0 && inner < row; inner *= sizes[--axes])
            if (sizes[axes - 1] != 1 && from.strides[axes - 1] != 0) return;
        outer_sizes_.assign(sizes.begin(), sizes.begin() + axes);
        outer_.address = from.address;
        outer_.strides.assign(from.strides.begin(), from.strides.begin() + axes);
        rows_run_ = row > 1 ? run_length(outer_sizes_, outer_.strides) : 0;
    }

    T* read(std::int64_t start, std::int64_t n, T* to) const {
        const T* data = reinterpret_cast<const T*>(from_.address);
        if (start / run_ == (start + n - 1) / run_) return const_cast<T*>(data) + offset_of(from_, sizes_, start);
        if (rows_run_ == 0) {
            gather(from_, sizes_, start, n, to);
            return to;
        }
        const T* number = nullptr;  // one a row
        for (std::int64_t k = start / row_, i = 0; i < n; ++k, i += row_) {
            number = number && k % rows_run_ ? number + 1 : data + offset_of(outer_, outer_sizes_, k);
            std::fill(to + i, to + i + row_, *number);
        }
        return to;
    }

private:
    const Operand& from_;
    const std::vector<std::int64_t>& sizes_;
    std::int64_t row_, run_, rows_run_ = 0;  // how many elements, or numbers of rows, lie beside each other
    std::vector<std::int64_t> outer_sizes_;
    Operand outer_;
};

struct Result {
    std::uintptr_t address;
    bool per_row;  // one element a row is kept
};

template <class T>
struct Job {
    const std::vector<Instruction>& program;
    const std::vector<std::int64_t>& sizes;
    const std::vector<Operand>& operands;
    const std::vector<Result>& results;
    std::int64_t registers, row, piece, total, share;
    std::atomic<std::int64_t> next{0};  // where the first share begins that nobody has taken yet

    static void part(void* data) {
        auto& job = *static_cast<Job*>(data);
        while (true) {  // a nested region has one thread only, which takes all
            const std::int64_t begin = job.next.fetch_add(job.share, std::memory_order_relaxed);
            if (begin >= job.total) return;
            job.run(begin, std::min(begin + job.share, job.total));
        }
    }

    // Slots of the program: operands, results, registers.
    void run(std::int64_t begin, std::int64_t end) const {
        const std::size_t count = operands.size(), first = count + results.size(), slots = first + registers;
        std::vector<T> memory(slots * piece + 16);
        const auto misplaced = reinterpret_cast<std::uintptr_t>(memory.data()) % 64 / sizeof(T);
        T* const base = memory.data() + (misplaced ? 64 / sizeof(T) - misplaced : 0);
        std::vector<Reader<T>> readers;
        for (const Operand& operand : operands) readers.emplace_back(operand, sizes, row);
        std::vector<T*> at(slots);
        for (std::size_t k = 0; k < slots; ++k) at[k] = base + k * piece;
        for (std::int64_t start = begin; start < end; start += piece) {
            const std::int64_t n = std::min(piece, end - start);
            for (std::size_t k = 0; k < count; ++k) at[k] = readers[k].read(start, n, base + k * piece);
            for (std::size_t k = 0; k < results.size(); ++k)
                if (!results[k].per_row) at[count + k] = reinterpret_cast<T*>(results[k].address) + start;
            execute_one(program, at.data(), n, row);
            for (std::size_t k = 0; k < results.size(); ++k)
                if (results[k].per_row)
                    for (std::int64_t i = 0; i < n; i += row)
                        reinterpret_cast<T*>(results[k].address)[(start + i) / row] = at[count + k][i];
        }
    }
};

template <class T>
void run_typed(const std::vector<Instruction>& program, std::int64_t registers, std::int64_t row,
               const std::vector<std::int64_t>& sizes, const std::vector<Operand>& operands,
               const std::vector<Result>& results, unsigned threads) {
    std::int64_t total = 1;
    for (auto size : sizes) total *= size;
    const auto wanted = std::min<std::int64_t>(threads, (total + GRAIN - 1) / GRAIN);
    threads = static_cast<unsigned>(std::max<std::int64_t>(wanted, 1));
    const std::int64_t piece = row * std::max<std::int64_t>(PIECE / row, 1);
    std::int64_t share = (total + threads - 1) / threads;
    share += (piece - share % piece) % piece;
    Job<T> job{program, sizes, operands, results, registers, row, piece, total, share, {0}};
    in_parallel(&Job<T>::part, &job, threads);
}

// A program, checked once.
class Program {
public:
    Program(const std::vector<std::tuple<std::string, std::vector<std::int64_t>, double>>& rows, std::int64_t operands,
            const std::vector<bool>& per_row, std::int64_t registers)
        : operands_(operands), per_row_(per_row), registers_(registers) {
        const std::int64_t slots = operands + static_cast<std::int64_t>(per_row.size()) + registers;
        for (const auto& [name, places, number] : rows) {
            const auto found = std::find(NAMES, NAMES + OPS, name);
            if (found == NAMES + OPS) throw std::invalid_argument("no such instruction: " + name);
            if (places.empty() || places.size() > 4) throw std::invalid_argument("an instruction has 1 to 4 places");
            for (auto place : places)
                if (place < 0 || place >= slots) throw std::invalid_argument("an instruction's place is out of range");
            if (places[0] < operands) throw std::invalid_argument("operands are not written to");
            std::int64_t at[4] = {places[0], places[0], places[0], places[0]};
            std::copy(places.begin(), places.end(), at);
            program_.push_back({found - NAMES, at[0], at[1], at[2], at[3], number});
        }
    }

    void run(bool is_double, const std::vector<std::int64_t>& sizes,
             const std::vector<std::pair<std::uintptr_t, std::vector<std::int64_t>>>& operands,
             const std::vector<std::uintptr_t>& results, unsigned threads, std::int64_t row) const {
        if (static_cast<std::int64_t>(operands.size()) != operands_ || results.size() != per_row_.size())
            throw std::invalid_argument("the program has other numbers of operands and results");
        std::int64_t inner = 1;
        for (std::size_t d = sizes.size(); d-- > 0 && inner < row;) inner *= sizes[d];
        if (row < 1 || inner != row) throw std::invalid_argument("rows are made of the last axes");
        std::vector<Operand> given;
        for (const auto& [address, strides] : operands) {
            if (strides.size() != sizes.size()) throw std::invalid_argument("an operand has other axes than the results");
            given.push_back({address, strides});
        }
        std::vector<Result> made;
        for (std::size_t k = 0; k < results.size(); ++k) made.push_back({results[k], per_row_[k]});
        py::gil_scoped_release release;
        if (is_double) run_typed<double>(program_, registers_, row, sizes, given, made, threads);
        else run_typed<float>(program_, registers_, row, sizes, given, made, threads);
    }

private:
    std::vector<Instruction> program_;
    std::int64_t operands_;
    std::vector<bool> per_row_;
    std::int64_t registers_;
};

}  // namespace

void bind_program(py::module_& m) {
    py::class_<Program>(m, "Program", "A program: (name, (to, a, b, c), number) a row; slots are operands, results and "
                                      "registers. ``per_row``: of which results one element a row is kept.")
        .def(py::init<const std::vector<std::tuple<std::string, std::vector<std::int64_t>, double>>&, std::int64_t,
                      const std::vector<bool>&, std::int64_t>(),
             py::arg("rows"), py::arg("operands"), py::arg("per_row"), py::arg("registers"))
        .def("run", &Program::run, py::arg("is_double"), py::arg("sizes"), py::arg("operands"), py::arg("results"),
             py::arg("threads"), py::arg("row"),
             "Evaluate over tensors of ``sizes``: operands as (address, strides), results as addresses of dense tensors. "
             "A ``row`` is so many elements that lie beside each other.");
}
