import jax

# Before anything else uses JAX: the suite runs on four CPU devices, also on a machine with one core.
jax.config.update("jax_num_cpu_devices", 4)
