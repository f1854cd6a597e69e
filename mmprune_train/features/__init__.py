"""The feature cache: what stage 1 leaves of images, kept on disk, so that a frozen encoder reads each image once."""
