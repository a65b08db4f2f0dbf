"""The trainer: loop, data, checkpoints, run directory. Nothing here is imported by `import efftune`."""
