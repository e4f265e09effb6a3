collect_ignore_glob = ["[!t]*.py"]  # scripts, some of which need what is not installed here
