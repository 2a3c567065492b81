"""Which ranks work together: topology (integers), ParallelMesh (groups), differentiable collectives."""
