"""Studies: distillations that differ by what is compared, and a page about them."""
