"""What nobody should pass, for every operator and every public function."""
