"""What `keye doctor` looks at: the machine, the kernels on its GPU, the video library, room, caches, a model and its answers."""
