// Package registry holds services by name, and no more of them than a bound. A
// service lives while it has begun more than it has ended; what it is and what
// it counts in public is nobody's business here.
package registry

import (
	"container/heap"
	"strings"
	"sync"
	"sync/atomic"
)

// Max bounds the services that are not pinned.
const Max = 4096

// looks is how many candidates for being forgotten one addition looks at. So a
// crowd of busy services never makes a request slow; the registry exceeds its
// bound until some of them can go.
const looks = 16

// A Life says whether a service is in use. Uses that end well have a counter of
// their own: most do, and their number is all that is to be said of them. So the
// success path has nothing else to count.
type Life struct {
	begun atomic.Uint64 // uses, and the flag gone
	well  atomic.Uint64 // uses that have ended well
	ended atomic.Uint64 // uses that have ended otherwise
	final atomic.Uint64 // uses when it was closed
	used  atomic.Uint64 // when, in ticks of the registry
}

const gone = 1 << 63 // the service has been forgotten: nobody may begin to use it

// Begin begins a use. It returns false if the service has been forgotten; then
// nothing has begun.
func (l *Life) Begin() bool { return l.begun.Add(1)&gone == 0 }

// EndWell ends a use of which nothing else is to be said.
func (l *Life) EndWell() { l.well.Add(1) }

// End ends any other use.
func (l *Life) End() { l.ended.Add(1) }

// Begun returns how many uses have begun.
func (l *Life) Begun() uint64 {
	if n := l.begun.Load(); n&gone == 0 {
		return n
	}
	return l.final.Load() // not those that were tried in vain
}

// EndedWell returns how many uses have ended by EndWell.
func (l *Life) EndedWell() uint64 { return l.well.Load() }

// InUse reports whether a use has begun that has not ended.
func (l *Life) InUse() bool {
	ended := l.well.Load() + l.ended.Load() // before what begins
	return l.Begun() != ended
}

// close makes the service unusable, unless somebody uses it.
func (l *Life) close() bool {
	ended := l.well.Load() + l.ended.Load()
	l.final.Store(ended)
	return l.begun.CompareAndSwap(ended, ended|gone)
}

// reopen takes close back. Begin may have been tried in vain meanwhile.
func (l *Life) reopen() { l.begun.Store(l.final.Load()) }

// A Member is a service as the registry sees it. Its methods are called with the
// registry's lock held and must not call the registry.
type Member interface {
	Life() *Life
	Name() string
	Forgettable() bool // reports whether Forget would succeed now, if nobody used it
	Forget() bool      // ends it, or returns false
}

// A Registry holds members by name. It finds them without a lock. The zero
// Registry is empty and ready.
type Registry[V any, M interface {
	*V
	Member
}] struct {
	names Table[V]

	// clock ticks when another service than the one before is used. Nobody
	// looks at it until the registry is half full.
	clock   atomic.Uint64
	crowded atomic.Bool

	mu   sync.Mutex // guards the field below, and writes of names
	idle idleHeap[V]
}

// Get returns the member of that name, or nil.
func (r *Registry[V, M]) Get(name string) *V { return r.names.Get(name) }

// Add returns the member of that name, which make makes if there is none. A
// pinned one is never forgotten. It also returns which members have been
// forgotten for that.
func (r *Registry[V, M]) Add(name string, pinned bool, make func(name string) *V) (v *V, isNew bool, forgotten []*V) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if v := r.names.Get(name); v != nil {
		return v, false, nil
	}
	v = make(strings.Clone(name)) // name may be a part of a long URL
	if !pinned {
		forgotten = r.makeRoom()
		life := M(v).Life()
		life.used.Store(r.clock.Add(1))
		heap.Push(&r.idle, idleEntry[V]{life.used.Load(), life, v})
		r.crowded.Store(len(r.idle) >= Max/2)
	}
	r.names.Put(M(v).Name(), v)
	return v, true, forgotten
}

// Has reports whether v is still the member of its name.
func (r *Registry[V, M]) Has(v *V) bool { return r.names.Get(M(v).Name()) == v }

// Keep calls f with the member of that name while it cannot be forgotten. It
// reports whether there is one.
func (r *Registry[V, M]) Keep(name string, f func(*V)) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.names.Get(name)
	if v != nil {
		f(v)
	}
	return v != nil
}

// Touch notes that l's member is used now.
func (r *Registry[V, M]) Touch(l *Life) {
	if r.crowded.Load() && l.used.Load() != r.clock.Load() {
		l.used.Store(r.clock.Add(1))
	}
}

// All yields the members, in no order.
func (r *Registry[V, M]) All(yield func(*V) bool) { r.names.All()(yield) }

// makeRoom forgets the members that have been idle for longest, once there are
// Max of them, as far as a few looks go. It requires mu.
func (r *Registry[V, M]) makeRoom() (forgotten []*V) {
	for look := 0; len(r.idle) >= Max && look < looks; look++ {
		oldest := &r.idle[0]
		switch v := M(oldest.value); {
		case oldest.used != oldest.life.used.Load():
			oldest.used = oldest.life.used.Load()
			heap.Fix(&r.idle, 0)
		case v.Forgettable() && oldest.life.close():
			if !v.Forget() {
				oldest.life.reopen()
				continue
			}
			forgotten = append(forgotten, oldest.value)
			r.names.Remove(v.Name(), oldest.value)
			heap.Pop(&r.idle)
		default: // in use: look at it again when all others have been looked at
			oldest.life.used.Store(r.clock.Add(1))
			oldest.used = oldest.life.used.Load()
			heap.Fix(&r.idle, 0)
		}
	}
	return forgotten
}

// An idleHeap has the longest-idle member on top, as far as known: entries are
// brought up to date only when they get there.
type idleHeap[V any] []idleEntry[V]

type idleEntry[V any] struct {
	used  uint64
	life  *Life
	value *V
}

func (h idleHeap[V]) Len() int           { return len(h) }
func (h idleHeap[V]) Less(i, j int) bool { return h[i].used < h[j].used }
func (h idleHeap[V]) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *idleHeap[V]) Push(e any)        { *h = append(*h, e.(idleEntry[V])) }
func (h *idleHeap[V]) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = idleEntry[V]{}
	*h = old[:len(old)-1]
	return last
}
