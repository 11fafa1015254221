"""Virtual time: how long a federation would take on the devices and networks of a profile."""
