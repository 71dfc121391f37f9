.PHONY: check
check:  ## lint, types, layers and tests, as CI runs them
	bash launch/test.sh
