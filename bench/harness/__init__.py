"""What bench/compare is made of; Python 3 and its standard library only."""
