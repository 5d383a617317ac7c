"""Every sample's own Jacobian, from one forward and one walk over the recorded graph."""
