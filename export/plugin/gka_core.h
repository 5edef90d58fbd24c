// The kernels of a bundle, found by op, attributes, types and shapes, and launched through the CUDA driver.
// Knows no framework: the adapters beside it translate. Every failure is an Error that names what was expected and what came.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace gka {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class T> struct Span {
    const T* data;
    int count;
    const T* begin() const { return data; }
    const T* end() const { return data + count; }
    const T& operator[](int i) const { return data[i]; }
};

// --- the tables, filled by gka_kernels.inc ----------------------------------------------------------------------------------

enum class Type { float32, float16, bfloat16 };

// A size as an expression of batch B and length T, in postfix order.
struct Term {
    enum Kind { constant, symbol, add, mul, floordiv, mod, max, min } kind;
    std::int64_t value; // of a constant; of a symbol 0 for B and 1 for T
};
using Size = Span<Term>;

constexpr int max_rank = 4;

struct Tensor {
    const char* name;
    Type type;
    int rank;
    Size shape[max_rank];
};

struct Argument {
    enum Kind { pointer, integer32, integer64, null } kind;
    int place; // of a pointer: its tensor among inputs, outputs and temporaries, in this order
    Size value; // of a pointer: its offset in bytes
};

struct Launch {
    const char* kernel;
    const void* cubin;
    const void* ptx; // null where it is for one GPU only
    Size grid[3];
    unsigned threads;
    unsigned shared_bytes;
    Span<Argument> arguments;
};

struct Target {
    int major, minor; // compute capability
    Span<Size> temporaries; // bytes
    Span<Launch> launches;
};

struct Attributes { // those that an op does not have are 0
    int num_heads;
    int chunk_size;
    float scale;
    float ridge_ratio;
    int num_iter;
};

struct Variant {
    const char* op;
    Attributes attributes;
    Span<Tensor> inputs, outputs;
    Span<Target> targets;
};

extern const Variant variants[];
extern const int variant_count;

// --- sizes ------------------------------------------------------------------------------------------------------------------

// An algebra says what a value is: Value constant(int64_t), Value symbol(int), Value operation(Term::Kind, Value, Value).
template <class Algebra> typename Algebra::Value evaluate(const Size& size, const Algebra& algebra)
{
    std::vector<typename Algebra::Value> stack;
    for (const Term& term : size) {
        if (term.kind == Term::constant)
            stack.push_back(algebra.constant(term.value));
        else if (term.kind == Term::symbol)
            stack.push_back(algebra.symbol(static_cast<int>(term.value)));
        else {
            const typename Algebra::Value right = stack.back();
            stack.pop_back();
            stack.back() = algebra.operation(term.kind, stack.back(), right);
        }
    }
    return stack.back();
}

struct Sizes {
    std::int64_t B, T; // -1: not known
};

std::int64_t evaluate(const Size& size, const Sizes& sizes);

// --- finding kernels --------------------------------------------------------------------------------------------------------

constexpr int unknown = -1;

// What a framework says of a tensor; type and dimensions may be unknown.
struct Given {
    int type = unknown; // a Type
    int rank = unknown;
    std::int64_t dims[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
};

// One node of a network: the variants of its op, attributes and inputs.
class Node {
public:
    // inputs: the names of those present, comma-separated, in the order of the op.
    Node(const std::string& op, const Attributes& attributes, const std::string& inputs);

    const std::string& op() const { return op_; }
    const Attributes& attributes() const { return attributes_; }
    const std::string& inputs() const { return inputs_; }

    int input_count() const { return candidates_.front()->inputs.count; }
    int output_count() const { return candidates_.front()->outputs.count; }

    // The first variant that agrees with the first count of inputs and outputs as far as they are known, or null.
    const Variant* find(const Given* tensors, int count) const;

    // The same, or an Error.
    const Variant& get(const Given* tensors, int count) const;

private:
    std::string op_, inputs_;
    Attributes attributes_;
    std::vector<const Variant*> candidates_;
};

// B and T from the shapes of all inputs, each of which has to agree.
Sizes bind(const Variant& variant, const Given* inputs);

// --- launching --------------------------------------------------------------------------------------------------------------

// Bytes for the temporaries of any target; the workspace is aligned like a tensor.
std::size_t workspace_bytes(const Variant& variant, const Sizes& sizes);

// Launch the op on a stream (a CUstream or cudaStream_t) of the current CUDA context. Every pointer is a multiple of 16 bytes.
void launch(
    const Variant& variant, const Sizes& sizes, const void* const* inputs, void* const* outputs, void* workspace, void* stream);

} // namespace gka
