"""Which forward is whose and when: what is mounted, and the functions on hook points."""
