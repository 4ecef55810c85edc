"""What a compression will take: memory and disk from the sizes, seconds from a short probe of this machine."""
