"""Which of the four situations of transfer learning some data is in, as probes measure it, and the config for it."""
