#!/usr/bin/env bash
# Runs a static x86-64 Linux program that contains AVX-512 code on a machine whose CPU has none: boots
# a Debian kernel in the Bochs emulator with the program in its initramfs.
#
#   run_avx512.sh [--timeout SECONDS] [--env NAME=VALUE]... BINARY [ARGS...]
#
# The program's stdout and stderr, as one stream, come out on stdout once it has ended; messages of
# this script go to stderr. The program starts in an empty /tmp with an empty stdin, 1 GiB of memory,
# and no environment but HOME, PATH and what --env gives. The timeout (600 s unless told) is of this
# machine's clock and includes the boot, about ten seconds; clocks inside the guest mean nothing.
#
# Exit status: that of the program (128 + the signal's number if a signal killed it), or
#     2  wrong usage
#    77  a Debian package is missing: CTest and Automake count this as skipped
#   124  timeout
#   125  the emulator, the kernel or this script failed
#
# The kernel is downloaded once into $RMSNORM_EMULATION_CACHE, by default
# ${XDG_CACHE_HOME:-$HOME/.cache}/rmsnorm-emulation; nothing is installed. Runs may overlap.
#
# Known fault of Bochs 2.7: vcvtps2ph rounds an exact tie away from zero instead of to even, so f16
# stores are wrong in every tie to an even neighbour below. Take another witness for these.
set -euo pipefail

fail() {
  local status=$1
  shift
  printf 'run_avx512.sh: %s\n' "$*" >&2
  exit "$status"
}

usage='usage: run_avx512.sh [--timeout SECONDS] [--env NAME=VALUE]... BINARY [ARGS...]'
timeout_s=600
environment=()
while [[ $# -gt 0 && $1 == -* ]]; do
  [[ $# -ge 2 ]] || fail 2 "$usage"
  case $1 in
    --timeout)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "--timeout wants whole seconds above zero, got '$2'"
      timeout_s=$2
      ;;
    --env)
      [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail 2 "--env wants NAME=VALUE, got '$2'"
      environment+=("$2")
      ;;
    *) fail 2 "$usage" ;;
  esac
  shift 2
done
[[ $# -ge 1 ]] || fail 2 "$usage"
binary=$1
shift
[[ -f $binary && -r $binary ]] || fail 2 "cannot read '$binary'"

# The guest has no libraries. ldd names them, or a loader, exactly for what would need some.
is_dynamic() {
  ldd "$1" 2>/dev/null | grep -E '=>|/ld-' >/dev/null
}

require_packages() {
  local packages='bochs bochsbios vgabios isolinux syslinux-common genisoimage cpio busybox-static'
  local missing=() tool file
  for tool in bochs genisoimage cpio busybox apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  for file in "$system_bios" "$vga_bios" "$boot_loader" "$boot_loader_module"; do
    [[ -r $file ]] || missing+=("$file")
  done
  if command -v busybox >/dev/null && is_dynamic "$(command -v busybox)"; then
    missing+=('a static busybox')
  fi
  [[ ${#missing[@]} -eq 0 ]] || fail 77 "missing ${missing[*]}; install the Debian packages $packages"
}

system_bios=/usr/share/bochs/BIOS-bochs-latest
vga_bios=/usr/share/vgabios/vgabios.bin
boot_loader=/usr/lib/ISOLINUX/isolinux.bin
boot_loader_module=/usr/lib/syslinux/modules/bios/ldlinux.c32
require_packages
! is_dynamic "$binary" || fail 2 "'$binary' is dynamically linked; the guest has no libraries, link with -static"

cache=${RMSNORM_EMULATION_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/rmsnorm-emulation}
mkdir -p "$cache" || fail 125 "cannot write to '$cache'"
cache=$(cd "$cache" && pwd)
kernel=$cache/vmlinuz

work=$(mktemp -d)
stage=
emulator=
cleanup() {
  # timeout hands the signal on to Bochs; waiting keeps the files in place until Bochs has let go.
  if [[ -n $emulator ]]; then
    kill "$emulator" 2>/dev/null || true
    wait "$emulator" 2>/dev/null || true
  fi
  rm -rf "$work" ${stage:+"$stage"}
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# The cloud flavour has the few drivers that are needed built in and is the smallest to download. The
# work happens in a directory of its own next to the target, so that the final rename is atomic and
# concurrent first runs merely do it twice.
fetch_kernel() {
  local meta=linux-image-cloud-amd64 package
  stage=$(mktemp -d "$cache/fetch.XXXXXX")
  if ! (
    cd "$stage"
    package=$(LC_ALL=C apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1)
    [[ -n $package ]] && apt-get -o Acquire::Retries=3 download "$package" &&
      dpkg-deb --fsys-tarfile ./*.deb | tar -x --wildcards './boot/vmlinuz-*' &&
      mv boot/vmlinuz-* "$kernel"
  ) >"$work/fetch.log" 2>&1; then
    cat "$work/fetch.log" >&2
    fail 125 "cannot download the kernel that $meta depends on; does apt-get update work?"
  fi
  rm -rf "$stage"
}
[[ -s $kernel ]] || fetch_kernel

quote() {
  printf " '%s'" "${1//\'/\'\\\'\'}"
}

# The guest: the first serial port is the kernel's console and brings the exit status, the second one
# carries what the program writes and nothing else, byte for byte.
root=$work/root
mkdir -p "$root"/{bin,dev,proc,tmp}
cp "$(command -v busybox)" "$root/bin/busybox"
cp "$binary" "$root/program"
chmod 755 "$root/bin/busybox" "$root/program"
ln -s busybox "$root/bin/sh"
{
  printf 'cd /tmp && exec /bin/busybox env -i HOME=/tmp PATH=/bin'
  for variable in ${environment[@]+"${environment[@]}"}; do quote "$variable"; done
  printf ' /program'
  for argument in "$@"; do quote "$argument"; done
  printf '\n'
} >"$root/command"
cat >"$root/init" <<'INIT'
#!/bin/sh
busybox() { /bin/busybox "$@"; }
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
exec </dev/null >/dev/ttyS0 2>&1
# Raw: the terminal layer must not turn newlines into carriage returns and newlines.
busybox stty -F /dev/ttyS1 115200 raw -echo
if busybox grep -qw avx512f /proc/cpuinfo; then
  # Closing the port at the end waits until everything is sent.
  /bin/sh /command >/dev/ttyS1 2>&1
  echo "guest exit status $?"
else
  echo 'the guest kernel does not offer AVX-512'
fi
# Setting the line's speed waits for the output as well; without it, power-off cuts off the status.
busybox stty -F /dev/ttyS0 115200
busybox poweroff -f
INIT
chmod 755 "$root/init"

image=$work/image
mkdir "$image"
# Not compressed: copying is cheaper than inflating in the emulator.
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$image/initrd"
# Copied because genisoimage writes its boot table into the file.
cp "$boot_loader" "$boot_loader_module" "$image/"
chmod u+w "$image"/*

kernel_arguments=(
  'console=ttyS0,115200'
  # Errors only: a boot log costs a second, and a line in the middle of the status would spoil it.
  quiet
  # Every way to die ends in a triple fault, on which Bochs stops, instead of hanging until the timeout.
  panic=-1 reboot=triple
  # 321 is xsavec, 323 xsaves: Bochs reports another size for the compacted XSAVE area than the kernel
  # computes, and on that mismatch the kernel turns AVX off. Without the two it uses plain XSAVE.
  'clearcpuid=321,323'
  # The self-tests of the crypto API take as long as all the rest of the boot.
  cryptomgr.notests
  # Pure cost here: nothing to protect from, nowhere to hide, no second CPU.
  mitigations=off nokaslr nosmp
  # The emulated clocks are derived from the count of instructions, so comparing them or calibrating
  # one against another finds faults that do not exist.
  tsc=reliable no_timer_check lpj=400000
  # RDRAND is the only entropy; without trust in it, a program that calls getrandom could wait for ever.
  random.trust_cpu=on
)
cat >"$image/isolinux.cfg" <<ISOLINUX
default guest
prompt 0
label guest
kernel vmlinuz
append initrd=initrd ${kernel_arguments[*]}
ISOLINUX
genisoimage -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat \
  -no-emul-boot -boot-load-size 4 -boot-info-table \
  -graft-points "$image" vmlinuz="$kernel" 2>"$work/iso.log" ||
  { cat "$work/iso.log" >&2; fail 125 'genisoimage failed'; }

# The paths in it are relative to $work, since Bochs cannot quote them.
#   cpu        The model that works: icelake_u and tigerlake hang before the kernel's first message. A
#              kernel reads model-specific registers that Bochs does not know, hence ignore_bad_msrs;
#              triple faults must end the run, see panic= above. ips only sets how long a guest second
#              is.
#   memory     Allocated on the host only as far as the guest touches it.
#   display_library, sound
#              Debian builds no null display. rfb is a VNC server which here waits for nobody, and the
#              sound devices would look for hardware.
#   clock      Guest time follows the instructions, not the host's clock: idle waits take no time.
#   panic      Power-off is a "panic" as well; the default action asks at a prompt.
cat >"$work/bochsrc" <<BOCHSRC
cpu: model=corei7_skylake_x, count=1, ips=50000000, ignore_bad_msrs=1, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=$system_bios
vgaromimage: file=$vga_bios
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
speaker: enabled=0
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=console
com2: enabled=1, mode=file, dev=output
clock: sync=none
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
BOCHSRC
# Debian's Bochs starts in its debugger: this tells it to continue.
echo c >"$work/debugger"

# The VNC server binds the first free of 50 ports on every interface. In a network namespace of its
# own nobody can reach it and any number of runs fit; where that is forbidden, it works without.
isolate=()
if unshare --map-root-user --net true 2>/dev/null; then
  isolate=(unshare --map-root-user --net)
fi

# In the background, because bash runs no trap while it waits for a foreground command.
(cd "$work" && exec timeout --kill-after=5 "$timeout_s" \
  ${isolate[@]+"${isolate[@]}"} bochs -q -f bochsrc -rc debugger) </dev/null >"$work/bochs.out" 2>&1 &
emulator=$!
emulator_status=0
wait "$emulator" || emulator_status=$?
emulator=

[[ ! -f $work/output ]] || cat "$work/output"

# Bochs exits with 1 at power-off as after a failure: only the status line tells.
status=
[[ ! -f $work/console ]] ||
  status=$(tr -d '\r' <"$work/console" | sed -n 's/^guest exit status \([0-9]*\)$/\1/p' | tail -n 1)
[[ -z $status ]] || exit "$status"

[[ $emulator_status -ne 124 && $emulator_status -ne 137 ]] ||
  fail 124 "no exit status within $timeout_s s, boot included"
{
  for log in console bochs.out; do
    [[ ! -s $work/$log ]] || { echo "--- end of $log"; tail -n 15 "$work/$log"; }
  done
  grep -a 'PANIC' "$work/bochs.log" || true
} >&2
fail 125 "the guest ended without an exit status (bochs: $emulator_status)"
