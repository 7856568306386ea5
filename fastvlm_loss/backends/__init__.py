"""How statistics and gradients of a `Problem` are computed: one module a backend, one meaning."""
