// filled as the module is
