"""Adaptive batch sizes inside other libraries' training loops.

Each module needs its library, an optional extra of this package; nothing here is imported by
`import adagrad_kernels`:

- `integrations.lightning`: `AdaptiveBatchCallback` for Lightning's `Trainer`;
- `integrations.transformers`: `AdaptiveBatchMixin` for the `Trainer` of transformers;
- `integrations.accelerate`: `prepare`, in place of `Accelerator.prepare`.
"""
