"""Ways to multiply and to attend, a folder per kind of device. Every rank on such a device."""
