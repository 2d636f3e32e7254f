"""How worker processes are started, and what other launchers bring along."""
