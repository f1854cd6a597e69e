"""The feature cache: kept visual tokens of images, on disk, so that a frozen encoder reads each image once."""
