"""Reads kernels written in Metal Shading Language and writes them for CUDA and the simulator.

The stages, one module each: ``lexer`` (text to tokens), ``preprocess`` (macros and includes),
``parse`` (kernels, instantiations, and every rule of the dialect), ``emit`` (tokens to C++).
"""
