// Drives export/plugin/gka_core for tests/test_plugin.py: one node and its tensors from standard input, what came of it to standard
// output.
//
//     op inputs num_heads chunk_size scale ridge_ratio num_iter
//     type rank sizes            a line per input
#include <iostream>

#include "gka_core.h"

int main()
{
    std::string op, inputs;
    gka::Attributes attributes{};
    std::cin >> op >> inputs >> attributes.num_heads >> attributes.chunk_size >> attributes.scale >> attributes.ridge_ratio
        >> attributes.num_iter;
    std::vector<gka::Given> tensors;
    for (gka::Given tensor; std::cin >> tensor.type >> tensor.rank; tensors.push_back(tensor))
        for (int d = 0; d < tensor.rank; ++d)
            std::cin >> tensor.dims[d];
    try {
        gka::Node const node(op, attributes, inputs);
        gka::Variant const& variant = node.get(tensors.data(), static_cast<int>(tensors.size()));
        gka::Sizes const sizes = gka::bind(variant, tensors.data());
        std::cout << "workspace " << gka::workspace_bytes(variant, sizes) << std::endl;
        std::vector<void const*> given;
        std::vector<void*> made;
        for (std::intptr_t i = 0; i < node.input_count(); ++i)
            given.push_back(reinterpret_cast<void const*>((i + 1) << 20));
        for (std::intptr_t i = 0; i < node.output_count(); ++i)
            made.push_back(reinterpret_cast<void*>((i + 1) << 30));
        for (int repeat = 0; repeat < 2; ++repeat) // code is loaded once
            gka::launch(variant, sizes, given.data(), made.data(), reinterpret_cast<void*>(std::intptr_t{1} << 40),
                reinterpret_cast<void*>(7));
        made.back() = reinterpret_cast<void*>(8);
        gka::launch(variant, sizes, given.data(), made.data(), nullptr, nullptr);
    } catch (gka::Error const& error) {
        std::cout << "error " << error.what() << std::endl;
    }
}
