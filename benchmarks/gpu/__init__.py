"""Everything about the GPU backends that is measured on a GPU, or foretold without one."""
