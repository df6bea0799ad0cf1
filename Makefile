# What to run, for people and for continuous integration. See README.md.

CARGO ?= cargo
JOBS ?= $(shell nproc)

# A toolchain that rustup installed is often not in root's PATH, and Debian's own is too old.
export PATH := $(HOME)/.cargo/bin:$(PATH)
RUST := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
export CARGO_BUILD_JOBS ?= $(JOBS)
export CARGO

TARGET := $(or $(CARGO_TARGET_DIR),target)
TESTBED := $(TARGET)/release/testbed
VERSION := $(shell sed -n '/^\[workspace\.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
DEB := $(CURDIR)/dist/vmshadow_$(VERSION)_amd64.deb
# For edges. The testbed takes it from beside the other one.
DEB_EDGE := $(CURDIR)/dist/netproxy_$(VERSION)_amd64.deb

# Runs inside the testbed's guests, which bring it along themselves.
WORKSPACE := --workspace --exclude testbed-guest

CLIPPY := $(CARGO) clippy --workspace --locked

# Xen's own checker of migration streams.
CHECKER := $(abspath $(TARGET))/xen-utils/usr/lib/xen-4.17/bin/verify-stream-v2

# The server of links by ssh that are measured.
SSHD := $(abspath $(TARGET))/openssh-server/usr/sbin/sshd

# What the end-to-end tests run with.
E2E := VMSHADOW_DEB='$(DEB)' VMSHADOW_ORACLE='$(abspath $(TARGET))/debug/examples/oracle' \
	$(CARGO) test $(WORKSPACE) --locked --test e2e -- --test-threads=1
# Some of them only: make test ONLY='refused oracle'
ONLY ?=
# A name that no test has would pass as all of them do.
NAMED = for name in $(ONLY); do $(E2E) --list "$$name" | grep -q ': test$$' || \
	{ echo "No end-to-end test is called $$name" >&2; exit 1; }; done

# Of the proxy's tests in network namespaces, those that take a minute together.
RETARGET := one_stream_survives_one_move one_socket_is_made_anew_over_ipv6 a_thousand_connections \
	one_that_can_not_be_moved killed_in_the_middle lost_packets_at_the_release detours:: \
	a_smaller_path_mtu a_guest_that_is_routed clients_who_come_or_go steps_out_of_order \
	vanishing:: a_hold_whose_time_is_over a_site_that_refuses a_client_that_resets \
	a_move_is_its_callers no_buffer_grows taken_along_once a_guest_that_comes_after_its_move \
	a_held_guest_that_arrived a_connection_that_ends_while a_service_that_is_gone \
	last_words_of a_routed_guest_is

SCRIPTS := .ci/run packaging/build-deb packaging/deb/postinst packaging/deb/prerm \
	packaging/deb/postrm packaging/netproxy/postinst packaging/netproxy/prerm \
	packaging/netproxy/postrm tests/testbed/install-packages

.PHONY: help demo test test-full unit bench record bench-xl deb lint clean packages root toolchain
.DEFAULT_GOAL := help

help:
	@echo 'VMShadow $(VERSION): live migration of Xen guests'
	@echo
	@echo '  make demo       two Xen sites here, a guest, and its move, to look at'
	@echo '  make test       all tests, with a pairwise selection of the matrix'
	@echo '  make test-full  all tests, with the whole matrix: hours'
	@echo '  make bench      measure the engine beside compressors and QEMU'
	@echo '  make record     record real guests for make bench: some minutes, once'
	@echo '  make bench-xl   measure against xl migrate'
	@echo '  make bench-proxy  measure the proxy against HAProxy, and the stall of a move'
	@echo '  make deb        the Debian packages, into dist/'
	@echo '  make lint       formatting, warnings, shell scripts, the packages'
	@echo '  make clean      remove what was built'
	@echo
	@echo 'They need Debian 12, root and Rust $(RUST) or newer, and install the Debian'
	@echo 'packages that they miss. JOBS=N limits how many compilers run at once.'

demo: deb
	$(CARGO) build --release --locked -p testbed
	VMSHADOW_DEB='$(DEB)' $(TESTBED) demo

# What is named is run, also where `make test` leaves it out.
test: unit deb
	$(NAMED)
	$(E2E) $(if $(ONLY),--include-ignored) $(ONLY)

test-full: unit deb
	$(CARGO) test --release --locked -p netproxy --test namespaces -- --include-ignored --skip be_a_caller
	$(NAMED)
	$(E2E) --include-ignored $(ONLY)

# Unit, property and documentation tests. Builds the examples too, and so what compares our image of
# a guest with the stock saver's.
unit: packages $(CHECKER)
	$(CARGO) fmt --all --check
	$(CLIPPY) --all-targets -- -D warnings
	$(CLIPPY) --test e2e --test namespaces -- -D warnings # none of "all targets"
	VERIFY_STREAM='$(CHECKER)' $(CARGO) test $(WORKSPACE) --locked
	$(CARGO) test $(WORKSPACE) --locked --test namespaces -- --test-threads=1 $(RETARGET)

# Taken out of its package. Installed, that would bring services of a Xen host along.
$(CHECKER): | packages
	rm -rf '$(TARGET)/xen-utils'
	mkdir -p '$(TARGET)/xen-utils'
	cd '$(TARGET)/xen-utils' && { apt-get --quiet download xen-utils-4.17 || { apt-get --quiet update && \
		apt-get --quiet download xen-utils-4.17; }; } && dpkg-deb -x xen-utils-*.deb .
	@[ -f '$@' ] || { echo 'The package xen-utils-4.17 does not have $(notdir $@) where it was' >&2; exit 1; }

# Over guests that are replayed: those of `make record`, and a generated one. Give the machine
# nothing else to do.
bench: packages $(SSHD)
	SSHD='$(SSHD)' $(CARGO) bench --locked -p migrate --bench engine

# Taken out of its package. Installed, it would serve this machine.
$(SSHD): | packages
	rm -rf '$(TARGET)/openssh-server'
	mkdir -p '$(TARGET)/openssh-server'
	cd '$(TARGET)/openssh-server' && { apt-get --quiet download openssh-server libwrap0 || \
		{ apt-get --quiet update && apt-get --quiet download openssh-server libwrap0; }; } && \
		for package in *.deb; do dpkg-deb -x "$$package" .; done

# Real guests' memory over time, into the cache, for `make bench`.
record: packages
	$(CARGO) build --release --locked -p testbed
	$(CARGO) build --release --locked -p migrate --example record
	VMSHADOW_RECORDER='$(abspath $(TARGET))/release/examples/record' $(TESTBED) record

# Some of it only: make bench-xl ROWS='--memory 128 --load group'
ROWS ?=
bench-xl: deb
	$(CARGO) build --release --locked -p testbed
	VMSHADOW_DEB='$(DEB)' $(TESTBED) bench-xl $(ROWS)

# In network namespaces that it makes. Give the machine nothing else to do.
bench-proxy: packages
	command -v haproxy >/dev/null || apt-get install -y --no-install-recommends haproxy
	$(CARGO) bench --locked -p netproxy --bench proxy
	$(CARGO) bench --locked -p netproxy --bench stall

deb: packages
	packaging/build-deb dist

lint: deb
	$(CARGO) fmt --all --check
	$(CLIPPY) --all-targets -- -D warnings
	$(CLIPPY) --test e2e --test namespaces -- -D warnings # none of "all targets"
	for script in $(SCRIPTS); do sh -n "$$script" || exit 1; done
	if command -v shellcheck >/dev/null; then shellcheck $(SCRIPTS); fi
	if command -v lintian >/dev/null; then \
		lintian --allow-root --fail-on error,warning '$(DEB)' '$(DEB_EDGE)'; fi

clean:
	$(CARGO) clean
	rm -rf dist

# What the build and the testbed need of Debian. Quick when all is there.
packages: root toolchain
	tests/testbed/install-packages

root:
	@[ "$$(id -u)" = 0 ] || { \
		echo 'This has to run as root: it installs packages, and its tests use network namespaces.' >&2; \
		exit 1; }

toolchain:
	@command -v $(CARGO) >/dev/null || { \
		echo 'There is no $(CARGO) here. Install Rust $(RUST) or newer first, for example with rustup.' >&2; \
		exit 1; }
	@found=$$($(CARGO) --version | cut -d ' ' -f 2); \
	[ "$$(printf '%s\n' '$(RUST)' "$$found" | sort -V | head -n 1)" = '$(RUST)' ] || { \
		echo "Rust $$found is too old. Install $(RUST) or newer first, for example with rustup." >&2; \
		exit 1; }
