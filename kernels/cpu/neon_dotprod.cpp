// NEON with the dot products of bytes that ARM has from version 8.2 on, for activations of 8 bits.
#define DOTPROD
#include "neon.cpp"
