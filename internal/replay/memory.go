package replay

import "sync/atomic"

// A Memory is what the recordings of many bodies may take together. It is safe
// for concurrent use. A nil Memory has no limit.
type Memory struct {
	// Limit is how many recorded bytes there may be at a time. It must not change
	// once there is a body. A read that is under way while its attempt gives way
	// to the next one is recorded in any case: it may exceed Limit, by 32 KiB at
	// most.
	Limit int64

	used atomic.Int64
}

// Used returns how many bytes are recorded now.
func (m *Memory) Used() int64 { return m.used.Load() }

// take reports whether there is room for n bytes more, which it then takes.
func (m *Memory) take(n int64) bool {
	if m == nil {
		return true
	}
	for {
		used := m.used.Load()
		if n > m.Limit-used {
			return false
		}
		if m.used.CompareAndSwap(used, used+n) {
			return true
		}
	}
}

// add takes n bytes whether there is room for them or not. A negative n gives
// them back.
func (m *Memory) add(n int64) {
	if m != nil {
		m.used.Add(n)
	}
}
