"""What an inference machine needs: the compressed layer, the artifact on disk, and the diffusers plug-in."""
