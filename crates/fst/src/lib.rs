//! Loads safetensors checkpoints from storage into host or GPU memory, as fast as the hardware
//! allows, and hands them out as typed tensors that own their memory.
