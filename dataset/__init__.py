"""Files on disk -> what they are: the layouts of data sets, and any image file as RGB."""
