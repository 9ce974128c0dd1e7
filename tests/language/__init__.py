"""Random expressions of the language, and what the CPU, g++ and a GPU make of them."""
