"""From a `Problem` to differentiable statistics: the op boundary, the one autograd Function, the public verbs."""
