// What both adapters translate: TensorRT's tensor descriptions, dimension expressions and plugin fields.
#pragma once

#include <NvInfer.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "gka_core.h"

namespace gka {

constexpr char const* plugin_version = "1"; // what the ONNX parser looks for where a node does not say
constexpr char const* plugin_namespace = "";
constexpr char const* const op_names[] = {"chunk_state", "chunk_output", "step"};

void report(char const* message) noexcept; // to TensorRT's logger; each adapter knows how to find it

// TensorRT takes no exceptions: report one and return what says failure.
template <class Result, class Body> Result guarded(Result failure, Body body) noexcept
{
    try {
        return body();
    } catch (std::exception const& error) {
        report(error.what());
        return failure;
    }
}

inline int type_of(nvinfer1::DataType type)
{
    if (type == nvinfer1::DataType::kFLOAT)
        return static_cast<int>(Type::float32);
    if (type == nvinfer1::DataType::kHALF)
        return static_cast<int>(Type::float16);
#if NV_TENSORRT_MAJOR >= 10
    if (type == nvinfer1::DataType::kBF16)
        return static_cast<int>(Type::bfloat16);
#endif
    return -2; // no variant has it
}

inline nvinfer1::DataType type_of(Type type)
{
#if NV_TENSORRT_MAJOR >= 10
    if (type == Type::bfloat16)
        return nvinfer1::DataType::kBF16;
#endif
    return type == Type::float32 ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kHALF;
}

inline Given given(nvinfer1::Dims const& dims)
{
    Given given;
    given.rank = dims.nbDims;
    for (int d = 0; d < dims.nbDims; ++d)
        given.dims[d] = dims.d[d];
    return given;
}

inline Given given(nvinfer1::PluginTensorDesc const& desc)
{
    Given given = gka::given(desc.dims);
    given.type = type_of(desc.type);
    return given;
}

inline Given given(nvinfer1::DynamicPluginTensorDesc const& tensor) { return given(tensor.desc); }

inline Given given(nvinfer1::DimsExprs const& dims)
{
    Given given;
    given.rank = dims.nbDims;
    for (int d = 0; d < dims.nbDims; ++d)
        given.dims[d] = dims.d[d]->isConstant() ? dims.d[d]->getConstantValue() : unknown;
    return given;
}

// Sizes as TensorRT's dimension expressions. B and T are those dimensions of the inputs that they name.
struct Expressions {
    using Value = nvinfer1::IDimensionExpr const*;
    nvinfer1::IExprBuilder& builder;
    Value symbols[2];

    Expressions(nvinfer1::IExprBuilder& builder, Variant const& variant, nvinfer1::DimsExprs const* inputs)
        : builder(builder)
        , symbols{nullptr, nullptr}
    {
        for (int i = 0; i < variant.inputs.count; ++i)
            for (int d = 0; d < variant.inputs[i].rank; ++d) {
                Size const& size = variant.inputs[i].shape[d];
                if (size.count == 1 && size[0].kind == Term::symbol)
                    symbols[size[0].value] = inputs[i].d[d];
            }
    }

    Value constant(std::int64_t value) const { return builder.constant(value); }
    Value symbol(int which) const { return symbols[which]; }
    Value operation(Term::Kind kind, Value a, Value b) const
    {
        using Operation = nvinfer1::DimensionOperation;
        switch (kind) {
        case Term::add: return builder.operation(Operation::kSUM, *a, *b);
        case Term::mul: return builder.operation(Operation::kPROD, *a, *b);
        case Term::floordiv: return builder.operation(Operation::kFLOOR_DIV, *a, *b);
        case Term::max: return builder.operation(Operation::kMAX, *a, *b);
        case Term::min: return builder.operation(Operation::kMIN, *a, *b);
        default: // a mod b
            return builder.operation(
                Operation::kSUB, *a, *builder.operation(Operation::kPROD, *b, *builder.operation(Operation::kFLOOR_DIV, *a, *b)));
        }
    }
};

// The node that a plugin stands for, and what every version of the interface asks of it.
class Plugin {
public:
    explicit Plugin(Node const& node)
        : node(node)
    {
    }

    nvinfer1::DimsExprs output_shape(int index, nvinfer1::DimsExprs const* inputs, int count, nvinfer1::IExprBuilder& builder) const
    {
        std::vector<Given> tensors = all(inputs, count);
        Variant const& variant = node.get(tensors.data(), count);
        Expressions const expressions(builder, variant, inputs);
        Tensor const& output = variant.outputs[index];
        nvinfer1::DimsExprs shape;
        shape.nbDims = output.rank;
        for (int d = 0; d < output.rank; ++d)
            shape.d[d] = evaluate(output.shape[d], expressions);
        return shape;
    }

    // Where no variant takes the network's types, TensorRT has to cast to one of them: say what that gives.
    nvinfer1::DataType output_type(int index, nvinfer1::DataType const* inputs, int count) const
    {
        std::vector<Given> tensors(count);
        Variant const* variant = &node.get(tensors.data(), count);
        for (int i = 0; i < count; ++i)
            tensors[i].type = type_of(inputs[i]);
        if (Variant const* exact = node.find(tensors.data(), count))
            variant = exact;
        return type_of(variant->outputs[index].type);
    }

    // Whether the first count of inputs and outputs are as some variant has them.
    template <class Desc> bool supports(Desc const* tensors, int count) const
    {
        return linear(tensors[count - 1]) && node.find(all(tensors, count).data(), count);
    }

    // inputs: descriptions, or largest dimensions.
    template <class Desc> std::size_t workspace(Desc const* inputs, int count) const
    {
        std::vector<Given> tensors = all(inputs, count);
        Variant const& variant = node.get(tensors.data(), count);
        return workspace_bytes(variant, bind(variant, tensors.data()));
    }

    int enqueue(nvinfer1::PluginTensorDesc const* descs, void const* const* inputs, void* const* outputs, void* workspace,
        void* stream) const
    {
        std::vector<Given> tensors = all(descs, node.input_count());
        Variant const& variant = node.get(tensors.data(), node.input_count());
        launch(variant, bind(variant, tensors.data()), inputs, outputs, workspace, stream);
        return 0;
    }

    Node const node;

private:
    template <class Desc> static std::vector<Given> all(Desc const* descs, int count)
    {
        std::vector<Given> tensors;
        for (int i = 0; i < count; ++i)
            tensors.push_back(given(descs[i]));
        return tensors;
    }

    static bool linear(nvinfer1::PluginTensorDesc const& desc) { return desc.format == nvinfer1::PluginFormat::kLINEAR; }
    static bool linear(nvinfer1::DynamicPluginTensorDesc const& tensor) { return linear(tensor.desc); }
};

// The fields of an op's nodes: its attributes, and "inputs", the names of the inputs that are there, comma-separated.
class Fields {
public:
    explicit Fields(char const* op)
    {
        static Attributes const none{};
        add(op, none, std::string());
    }

    // With the values of a node, for as long as it lives.
    explicit Fields(Node const& node) { add(node.op(), node.attributes(), node.inputs()); }

    Fields(Fields const&) = delete;
    Fields& operator=(Fields const&) = delete;

    nvinfer1::PluginFieldCollection const* collection() const { return &collection_; }

    static Node parse(char const* op, nvinfer1::PluginFieldCollection const& given)
    {
        Attributes attributes{};
        std::string inputs;
        for (int i = 0; i < given.nbFields; ++i) {
            nvinfer1::PluginField const& field = given.fields[i];
            std::string const name = field.name;
            if (name == "inputs") {
                inputs.assign(static_cast<char const*>(field.data), field.length);
                inputs.resize(std::strlen(inputs.c_str())); // some writers count the zero at the end
            } else if (name == "num_heads")
                attributes.num_heads = *static_cast<std::int32_t const*>(field.data);
            else if (name == "chunk_size")
                attributes.chunk_size = *static_cast<std::int32_t const*>(field.data);
            else if (name == "num_iter")
                attributes.num_iter = *static_cast<std::int32_t const*>(field.data);
            else if (name == "scale")
                attributes.scale = *static_cast<float const*>(field.data);
            else if (name == "ridge_ratio")
                attributes.ridge_ratio = *static_cast<float const*>(field.data);
        }
        return Node(op, attributes, inputs);
    }

private:
    void add(std::string const& op, Attributes const& attributes, std::string const& inputs)
    {
        using Kind = nvinfer1::PluginFieldType;
        if (op == "chunk_state")
            fields_.emplace_back("num_heads", &attributes.num_heads, Kind::kINT32, 1);
        else {
            fields_.emplace_back("scale", &attributes.scale, Kind::kFLOAT32, 1);
            fields_.emplace_back("ridge_ratio", &attributes.ridge_ratio, Kind::kFLOAT32, 1);
            fields_.emplace_back("num_iter", &attributes.num_iter, Kind::kINT32, 1);
        }
        if (op != "step")
            fields_.emplace_back("chunk_size", &attributes.chunk_size, Kind::kINT32, 1);
        fields_.emplace_back("inputs", inputs.data(), Kind::kCHAR, static_cast<int>(inputs.size()));
        collection_.nbFields = static_cast<int>(fields_.size());
        collection_.fields = fields_.data();
    }

    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

} // namespace gka
